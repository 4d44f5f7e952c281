"""Kronecker products of small matrices before linears: a mix of all channels at a fraction of a dense matrix's cost.

Source: FlatQuant, Sun et al., 2024, arXiv 2410.09426, section 3.1. A token ``x`` of ``a * b`` channels is read row by
row as a matrix ``X`` ``(a, b)``; then

    x (L (x) R)  =  L^T X R, read row by row

takes ``a b (a + b)`` multiply-adds in place of ``(a b)^2``, and ``a^2 + b^2`` numbers in place of ``(a b)^2``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowbit.models.runtime_ops import Place, RuntimeOp, expect_shapes
from lowbit.quant.activations import ActFormat

HALF = (torch.float16, torch.bfloat16)  # sums of many terms are taken in float32


def times_kronecker(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x (F_1 (x) F_2 (x) ...)`` for ``x`` ``(..., width)`` and square factors whose sizes multiply to ``width``.

    One small matrix product for each factor; differentiable in all. 16-bit inputs are multiplied in float32.

    >>> swap, double = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0]])
    >>> times_kronecker(torch.tensor([1.0, 2.0, 3.0, 4.0]), [swap, torch.eye(2)]).tolist()
    [3.0, 4.0, 1.0, 2.0]
    >>> times_kronecker(torch.tensor([1.0, 3.0]), [double, swap]).tolist()
    [6.0, 2.0]
    """
    if not x.numel():
        return x
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    out, inner = x.to(dtype), x.shape[-1]
    for factor in factors:
        size, own = len(factor), factor.to(dtype)
        inner //= size  # channels that a step of this factor's index passes over
        if inner == 1:
            out = out.reshape(-1, size) @ own
        else:
            out = own.mT @ out.reshape(-1, size, inner)
    return out.reshape(x.shape).to(x.dtype)


def sides(width: int) -> tuple[int, int]:
    """The sizes ``(a, b)`` of two factors for a width: ``a * b == width``, ``a <= b``, as close as possible.

    A prime width has ``(1, width)``, which is a dense matrix.

    >>> sides(576), sides(1536), sides(14336), sides(7)
    ((24, 24), (32, 48), (112, 128), (1, 7))
    """
    a = next(size for size in range(int(width**0.5), 0, -1) if width % size == 0)
    return a, width // a


@dataclass(frozen=True)
class Kronecker(RuntimeOp):
    """``x (L (x) R)``.

    Attributes:
        left: ``L`` ``(a, a)``, which mixes channels ``b`` apart.
        right: ``R`` ``(b, b)``, which mixes channels side by side; ``a * b`` is the width.
    """

    kind: ClassVar[str] = "kronecker"
    place: ClassVar[Place] = "behind a norm"
    on_inputs: ClassVar[bool] = True
    why: ClassVar[str] = "Kronecker products"

    left: Tensor
    right: Tensor

    def __call__(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """``(..., width) -> (..., width)``, in the dtype of ``x``."""
        return times_kronecker(x, (self.left, self.right))

    @property
    def width(self) -> int:
        """Channels, before and after."""
        return len(self.left) * len(self.right)

    @property
    def macs(self) -> int:
        """``a b (a + b)``."""
        return self.width * (len(self.left) + len(self.right))

    @property
    def bits(self) -> int:
        """Stored as float32."""
        return 32 * (self.left.numel() + self.right.numel())

    def to_tensors(self) -> dict[str, Tensor]:
        """``left`` and ``right`` float32."""
        return {name: getattr(self, name).detach().float().contiguous() for name in ("left", "right")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self:
        """``left`` ``(a, a)`` and ``right`` ``(b, b)`` with ``a * b == width``."""
        left = tensors.get("left")
        a = len(left) if left is not None and left.ndim == 2 else 0
        if not a or width % a:
            raise ValueError(f"has factors that do not multiply to {width} channels")
        expect_shapes(tensors, {"left": (a, a), "right": (width // a, width // a)})
        return cls(tensors["left"].float(), tensors["right"].float())
