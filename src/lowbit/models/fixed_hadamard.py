"""Walsh-Hadamard transforms without signs before linears: those that stock runtimes compute.

The matrix is Sylvester's, ``H_2 (x) ... (x) H_2``, on blocks of a power of two side by side. It is fixed by the size
of the blocks alone, so a runtime needs no tensor for it: the transform ``hadamard`` of compressed-tensors, for which
vLLM has a kernel. Outliers whose signs follow a row of the matrix add up in one channel; random signs make that
unlikely (``hadamard.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowbit.models.hadamard import factor_sizes, times_hadamard
from lowbit.models.runtime_ops import Place, RuntimeOp, expect_shapes
from lowbit.quant.activations import ActFormat


@dataclass(frozen=True)
class FixedHadamard(RuntimeOp):
    """``x`` times Sylvester's Hadamard matrix, block by block.

    Attributes:
        sizes: int32 ``(blocks,)``, the size of every block, all equal and a power of two.

    >>> FixedHadamard.of(4, 2)(torch.tensor([3.0, 1.0, 0.0, 2.0])).mul(2**0.5).round().tolist()
    [4.0, 2.0, 2.0, -2.0]
    """

    kind: ClassVar[str] = "fixed-hadamard"
    place: ClassVar[Place] = "behind a norm"
    on_inputs: ClassVar[bool] = True
    why: ClassVar[str] = "Hadamard transforms without signs"

    sizes: Tensor

    @classmethod
    def of(cls, width: int, size: int) -> Self:
        """The op for ``width`` channels in blocks of ``size``, which divides it."""
        return cls(torch.full((width // size,), size, dtype=torch.int32))

    def __call__(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """``(..., width) -> (..., width)``, in the dtype of ``x``; 16-bit inputs are multiplied in float32."""
        return times_hadamard(x.unflatten(-1, (len(self.sizes), self.size))).flatten(-2)

    @property
    def size(self) -> int:
        """Channels of a block."""
        return int(self.sizes[0])

    @property
    def width(self) -> int:
        """Channels, before and after."""
        return len(self.sizes) * self.size

    @property
    def macs(self) -> int:
        """The sizes of the factors for each channel."""
        return self.width * sum(factor_sizes(self.size))

    @property
    def bits(self) -> int:
        """A number for each block; the matrix is fixed."""
        return 32 * len(self.sizes)

    def to_tensors(self) -> dict[str, Tensor]:
        """``sizes`` int32."""
        return {"sizes": self.sizes.int().contiguous()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self:
        """``sizes`` of one power of two whose sum is ``width``."""
        sizes = tensors.get("sizes")
        blocks = sizes.numel() if sizes is not None else 0
        expect_shapes(tensors, {"sizes": (max(blocks, 1),)})
        assert sizes is not None
        if sizes.is_floating_point() or bool((sizes * blocks != width).any()) or int(sizes[0]) & (int(sizes[0]) - 1):
            raise ValueError(f"has blocks that are no equal powers of two with the sum of {width} channels")
        return cls(sizes.int())


def largest_power(width: int) -> int:
    """The largest power of two that divides a width.

    >>> largest_power(576), largest_power(1536), largest_power(4096)
    (64, 512, 4096)
    """
    return width & -width
