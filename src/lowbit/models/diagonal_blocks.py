"""Block-diagonal matrices before linears: channels are mixed within blocks, such as those that share a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowbit.models.kronecker import HALF
from lowbit.models.runtime_ops import Place, RuntimeOp, expect_shapes
from lowbit.quant.activations import ActFormat


@dataclass(frozen=True)
class DiagonalBlocks(RuntimeOp):
    """``x blockdiag(B_1, B_2, ...)``.

    Attributes:
        blocks: ``(count, size, size)``; ``count * size`` is the width.

    >>> blocks = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]]])
    >>> DiagonalBlocks(blocks)(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [2.0, 1.0, 6.0, 4.0]
    """

    kind: ClassVar[str] = "blocks"
    place: ClassVar[Place] = "behind a norm"
    on_inputs: ClassVar[bool] = True
    why: ClassVar[str] = "block-diagonal matrices"

    blocks: Tensor

    def __call__(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """``(..., width) -> (..., width)``, in the dtype of ``x``; 16-bit inputs are multiplied in float32."""
        return times_blocks(x, self.blocks)

    @property
    def width(self) -> int:
        """Channels, before and after."""
        return self.blocks.shape[0] * self.blocks.shape[1]

    @property
    def macs(self) -> int:
        """One for each entry."""
        return self.blocks.numel()

    @property
    def bits(self) -> int:
        """Stored as float32."""
        return 32 * self.blocks.numel()

    def to_tensors(self) -> dict[str, Tensor]:
        """``blocks`` float32."""
        return {"blocks": self.blocks.detach().float().contiguous()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self:
        """``blocks`` ``(count, size, size)`` with ``count * size == width``."""
        blocks = tensors.get("blocks")
        count = len(blocks) if blocks is not None and blocks.ndim == 3 else 0
        if not count or width % count:
            raise ValueError(f"has blocks that do not divide {width} channels")
        expect_shapes(tensors, {"blocks": (count, width // count, width // count)})
        return cls(tensors["blocks"].float())


def times_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """``x blockdiag(blocks)`` for ``x`` ``(..., count * size)`` and ``blocks`` ``(count, size, size)``."""
    if not x.numel():
        return x
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    rows = x.to(dtype).reshape(-1, *blocks.shape[:2])
    out = rows.transpose(0, 1) @ blocks.to(dtype)  # (count, tokens, size)
    return out.transpose(0, 1).reshape(x.shape).to(x.dtype)
