"""Reordered channels behind a norm, so that channels with similar ranges are neighbours.

Source: RPTQ, Yuan et al., 2023, arXiv 2304.01089, section 4.3. The order does not fold into the norm alone, since all
layers share the residual stream: the norm writes its output in the new order. Where the loaded model's norm is an RMS
norm, it does so in the same pass (``gathered_norm.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowbit.models.runtime_ops import Gather, Place, RuntimeOp, expect_shapes, take_channels
from lowbit.quant.activations import ActFormat


@dataclass(frozen=True)
class Reorder(RuntimeOp):
    """``x[idx]``, every channel once.

    Attributes:
        idx: int64 ``(width,)``, the source channel of each output channel.

    >>> Reorder(torch.tensor([2, 0, 1]))(torch.tensor([5.0, 6.0, 7.0])).tolist()
    [7.0, 5.0, 6.0]
    """

    kind: ClassVar[str] = "reorder"
    place: ClassVar[Place] = "behind a norm"
    why: ClassVar[str] = "reordered channels after norms"

    idx: Tensor

    def __call__(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """``(..., width) -> (..., width)``, in the dtype of ``x``."""
        return take_channels(x, self.idx)

    @property
    def gather(self) -> Gather:
        """The same as a gather, whose factors are 1."""
        return Gather(self.idx, torch.ones(len(self.idx), device=self.idx.device))

    @property
    def width(self) -> int:
        """Number of channels, before and after."""
        return len(self.idx)

    @property
    def macs(self) -> int:
        """Values move; none is multiplied."""
        return 0

    @property
    def bits(self) -> int:
        """Indices as int32."""
        return 32 * len(self.idx)

    def to_tensors(self) -> dict[str, Tensor]:
        """``idx`` int32."""
        return {"idx": self.idx.int()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self:
        """``idx`` ``(width,)``, every channel once."""
        expect_shapes(tensors, {"idx": (width,)})
        idx = tensors["idx"].long()
        if not torch.equal(idx.sort().values, torch.arange(width, device=idx.device)):
            raise ValueError("has a channel twice or none of it")
        return cls(idx)
