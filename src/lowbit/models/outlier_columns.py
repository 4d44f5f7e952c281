"""Outlier columns: some input channels of a linear stay in float, and so do the columns of its weight that read them.

Source: LLM.int8(), Dettmers et al., NeurIPS 2022, arXiv 2208.07339, equation 8. With ``O`` the outlier channels,

    x W^T = x_O W_O^T + Q(x_rest) Q(W_rest)^T

where ranges of ``Q`` are those of the rest alone. The codes of the outlier columns are stored too, as zeros, so that
rows keep their width; their 16-bit values come on top and count in a run's effective bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowbit.models.runtime_ops import Place, RuntimeOp, expect_shapes
from lowbit.quant.activations import ActFormat


@dataclass(frozen=True)
class OutlierColumns(RuntimeOp):
    """Input channels and weight columns of one linear that are not quantized.

    Attributes:
        kept: uint8 ``(width,)``, 1 for outlier channels.
        columns: float16 ``(out, channels kept)``, the weight's columns in the order of the channels.

    >>> from lowbit.quant.activations import IntTokens
    >>> op = OutlierColumns(torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([[5.0]], dtype=torch.float16))
    >>> op(torch.tensor([1.0, 90.1]), IntTokens(8, symmetric=False)).tolist()
    [1.0, 90.0999984741211]
    >>> op.weight(torch.tensor([[2.0, 0.0]])).tolist()
    [[2.0, 5.0]]
    """

    kind: ClassVar[str] = "outlier-columns"
    place: ClassVar[Place] = "before a linear"
    why: ClassVar[str] = "linears with columns in 16 bits"

    kept: Tensor
    columns: Tensor

    def __call__(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """``x`` ``(..., width)`` with all other channels quantized in ``format``, in ranges of their own."""
        if format is None:
            return x
        outlier = self.kept.bool()
        return torch.where(outlier, x, format.fake_quant(x.masked_fill(outlier, 0)))

    def weight(self, dequantized: Tensor) -> Tensor:
        """The weight ``(out, width)`` with the outlier columns in place of their codes."""
        return dequantized.index_copy(1, self.kept.nonzero().flatten(), self.columns.to(dequantized.dtype))

    @property
    def width(self) -> int:
        """Input channels of the linear."""
        return len(self.kept)

    @property
    def macs(self) -> int:
        """One for each 16-bit value: the zero codes in their place are multiplied as well."""
        return self.columns.numel()

    @property
    def bits(self) -> int:
        """A byte for each channel, 16 bits for each value."""
        return 8 * len(self.kept) + 16 * self.columns.numel()

    def to_tensors(self) -> dict[str, Tensor]:
        """``kept`` uint8 and ``columns`` float16."""
        return {"kept": self.kept.contiguous(), "columns": self.columns.detach().half().contiguous()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self:
        """``kept`` ``(width,)`` of 0 and 1, ``columns`` ``(out, ones)``."""
        kept, columns = tensors.get("kept"), tensors.get("columns")
        rows = len(columns) if columns is not None and columns.ndim == 2 else 0
        count = 0 if kept is None else int(kept.count_nonzero())
        expect_shapes(tensors, {"kept": (width,), "columns": (rows, count)})
        assert kept is not None
        assert columns is not None
        if kept.dtype != torch.uint8 or bool((kept > 1).any()):
            raise ValueError("marks channels with something other than 0 and 1")
        return cls(kept, columns.half())
