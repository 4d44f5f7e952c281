"""Hadamard transforms before linears: every channel is spread over all others, so that no outlier sets a range.

Sources: QuaRot, Ashkboos et al., NeurIPS 2024, arXiv 2404.00456, for random signs before a Hadamard matrix at the
inputs of linears; QuIP, Chee et al., 2023, arXiv 2307.13304, for why it helps: an orthogonal matrix with entries of
equal size makes values incoherent.

For ``n = 2^k m`` with ``m`` odd the matrix is

    H_n  =  H_2 (x) ... (x) H_2 (x) C_m,        H_2 = [[1, 1], [1, -1]] / sqrt(2)
    C_m[i, j]  =  (cos(2 pi i j / m) + sin(2 pi i j / m)) / sqrt(m)

``C_m`` is the discrete Hartley transform: fixed for every ``m``, real, symmetric and orthogonal, with entries of at
most ``sqrt(2 / m)``, so that it mixes nearly as well as a Hadamard matrix, which for an odd order does not exist. All
factors are symmetric, so ``H_n`` is its own inverse.

The transform of a token takes one product with a small matrix for each factor, ``n (64 + 8 + 9)`` multiply-adds for
``n = 512 * 9`` in place of ``n^2``; that is the fast Walsh-Hadamard transform in steps of up to six butterflies,
which on a CPU is several times faster than single ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowbit.models.kronecker import HALF, times_kronecker
from lowbit.models.runtime_ops import Place, RuntimeOp, expect_shapes
from lowbit.quant.activations import ActFormat

MOST = 6  # butterflies in one step, as a matrix of 64 x 64


def hartley(size: int) -> Tensor:
    """``C_m`` ``(size, size)`` float64: symmetric and orthogonal.

    >>> [[round(value, 3) for value in row] for row in hartley(3).tolist()]
    [[0.577, 0.577, 0.577], [0.577, 0.211, -0.789], [0.577, -0.789, 0.211]]
    """
    index = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi * (index[:, None] * index % size) / size
    return (angle.cos() + angle.sin()) / math.sqrt(size)


def factor_sizes(size: int) -> list[int]:
    """Sizes of the factors of ``H_n``, in order: powers of two up to 64, as equal as possible, then the odd part.

    >>> factor_sizes(576), factor_sizes(1536), factor_sizes(4096), factor_sizes(7)
    ([64, 9], [32, 16, 3], [64, 64], [7])
    """
    twos = (size & -size).bit_length() - 1
    steps = -(-twos // MOST)
    powers = [2 ** (twos // steps + (step < twos % steps)) for step in range(steps)]
    odd = size >> twos
    return [*powers, odd] if odd > 1 or not powers else powers


@lru_cache(maxsize=64)
def factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The factors of ``H_n``, in the order of ``factor_sizes``: symmetric, orthogonal, rounded to ``dtype``."""
    return tuple(_factor(own).to(device, dtype) for own in factor_sizes(size))


def _factor(size: int) -> Tensor:
    if size % 2:
        return hartley(size)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, two)
    return matrix


def times_hadamard(x: Tensor) -> Tensor:
    """``x H_n`` for ``x`` ``(..., n)``, in its dtype; differentiable, and its own inverse.

    >>> times_hadamard(torch.tensor([3.0, 1.0], dtype=torch.float64)).mul(2**0.5).tolist()
    [4.0, 2.0]
    """
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    return times_kronecker(x, factors(x.shape[-1], dtype, x.device))


def random_flips(blocks: int, size: int, seed: int) -> Tensor:
    """Which channels a random-sign Hadamard transform negates: uint8 ``(blocks, size)`` of 0 and 1, by a fair coin.

    The draw depends on the arguments alone.
    """
    return torch.randint(2, (blocks, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@dataclass(frozen=True)
class Hadamard(RuntimeOp):
    """Channels with flipped signs times ``H_n``, in one block or several side by side.

    Attributes:
        flips: uint8 ``(blocks, n)``, 1 for channels that are negated first; ``blocks * n`` is the width.

    >>> Hadamard(torch.tensor([[0, 1]], dtype=torch.uint8))(torch.tensor([3.0, 1.0])).mul(2**0.5).round().tolist()
    [2.0, 4.0]
    """

    kind: ClassVar[str] = "hadamard"
    place: ClassVar[Place] = "behind a norm"
    on_inputs: ClassVar[bool] = True
    why: ClassVar[str] = "Hadamard transforms"

    flips: Tensor

    def __call__(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """``(..., width) -> (..., width)``, in the dtype of ``x``."""
        blocks = x.unflatten(-1, self.flips.shape)
        return times_hadamard(blocks * (1 - 2 * self.flips.to(x.dtype))).flatten(-2)

    @property
    def width(self) -> int:
        """Channels, before and after."""
        return self.flips.numel()

    @property
    def macs(self) -> int:
        """The sizes of the factors for each channel, and one for its sign."""
        return self.width * (1 + sum(factor_sizes(self.flips.shape[1])))

    @property
    def bits(self) -> int:
        """A byte for each sign; the matrix is fixed."""
        return 8 * self.width

    def to_tensors(self) -> dict[str, Tensor]:
        """``flips`` uint8."""
        return {"flips": self.flips.contiguous()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self:
        """``flips`` ``(blocks, n)`` of 0 and 1 with ``blocks * n == width``."""
        flips = tensors.get("flips")
        blocks = len(flips) if flips is not None and flips.ndim == 2 else 0
        if not blocks or width % blocks:
            raise ValueError(f"has blocks that do not divide {width} channels")
        expect_shapes(tensors, {"flips": (blocks, width // blocks)})
        assert flips is not None
        if flips.dtype != torch.uint8 or bool((flips > 1).any()):
            raise ValueError("flips signs by something other than 0 and 1")
        return cls(flips)
