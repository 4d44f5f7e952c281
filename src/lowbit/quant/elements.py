"""Element types: what a code means before its scale is applied.

Codes of every type are unsigned and ordered by value, so that the position of a value between two codes is a number:
``-6`` is code 0 of E2M1, ``0`` is code 7, ``6`` is code 14. File formats number floating-point codes by their bits;
``to_bits`` and ``from_bits`` translate.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int:
    """Integer elements of ``bits`` bits; a code is the integer itself."""

    bits: int


@dataclass(frozen=True)
class Float:
    """Floating-point elements with a sign bit, without infinities (OCP Microscaling Formats, v1.0, section 5.3).

    Attributes:
        exponent, mantissa: their bits.
        largest: the largest value; formats with a NaN use fewer than all codes.

    >>> E2M1.nearest(torch.tensor([0.25, 0.75, 1.75, 2.5, 5.0, 9.0])).tolist()
    [0.0, 1.0, 2.0, 2.0, 4.0, 6.0]
    >>> E2M1.code(torch.tensor([-6.0, 0.0, 1.5])).tolist(), E2M1.value(torch.tensor([0.0, 7.0, 10.0])).tolist()
    ([0.0, 7.0, 10.0], [-6.0, 0.0, 1.5])
    """

    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def name(self) -> str:
        """``E2M1``."""
        return f"E{self.exponent}M{self.mantissa}"

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def largest_exponent(self) -> int:
        """Exponent of the largest value: 2 for E2M1, 8 for E4M3."""
        return int(torch.frexp(torch.tensor(self.largest)).exponent) - 1

    @property
    def middle(self) -> int:
        """The code of 0; the largest code is twice that."""
        return int(self._magnitude(torch.tensor(self.largest, dtype=torch.float64)))

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest value, ties to the even code; differentiable as the identity inside the range."""
        clamped = x.clamp(-self.largest, self.largest)
        return given(clamped, self._rounded(clamped.detach()))

    def _rounded(self, x: Tensor) -> Tensor:
        """Multiples of each value's step, from its bits: ``frexp`` and ``ldexp`` take five times as long.

        The binade's power of two is the value without its mantissa. ``1.5 * 2**23`` steps (of float32) are a number
        whose neighbours are one step apart, so that adding it rounds, and subtracting it leaves the rounded value.
        For E2M1 and 2.7 the power is 2, the step 1, and 2.7 + 12582912 = 12582915.
        """
        wide = x if x.dtype in _BITS else x.float()
        integers, mask, digits = _BITS[wide.dtype]
        power = (wide.view(integers) & mask).view(wide.dtype).clamp_(min=2.0**self.smallest_exponent)
        shift = power.mul_(1.5 * 2.0 ** (digits - self.mantissa))
        return (wide + shift).sub_(shift).to(x.dtype)

    def code(self, values: Tensor) -> Tensor:
        """Codes of values, or positions between codes, as floats; piecewise linear."""
        return self.middle + torch.copysign(self._magnitude(values.abs()), values)

    def value(self, codes: Tensor) -> Tensor:
        """Values of codes, or of positions between them: the inverse of ``code``."""
        steps = codes - self.middle
        size, unit = steps.abs(), 2**self.mantissa
        above = (size / unit).floor().clamp(min=1) - 1  # binades above the smallest normal one
        exponent = (above + (self.smallest_exponent - self.mantissa)).int()
        return torch.copysign(_times_power(size - above * unit, exponent), steps)

    def to_bits(self, codes: Tensor) -> Tensor:
        """Codes as bit patterns, sign in the highest bit; ``uint8``. There is no negative zero.

        >>> E2M1.to_bits(torch.tensor([0, 7, 10], dtype=torch.uint8)).tolist()
        [15, 0, 3]
        """
        steps = codes.to(torch.int16) - self.middle
        return (steps.abs() | ((steps < 0).to(torch.int16) << (self.bits - 1))).to(torch.uint8)

    def from_bits(self, bits: Tensor) -> Tensor:
        """The inverse of ``to_bits``; negative zero becomes zero."""
        sign = 1 << (self.bits - 1)
        size = (bits & (sign - 1)).to(torch.int16)
        return (self.middle + torch.where((bits & sign) != 0, -size, size)).to(torch.uint8)

    def _exponent(self, magnitude: Tensor) -> Tensor:
        """Exponent of the binade of ``magnitude``, int32; subnormal numbers share the smallest."""
        wide = magnitude if magnitude.dtype in (torch.float32, torch.float64) else magnitude.float()
        exponent = (torch.frexp(wide).exponent - 1).clamp(min=self.smallest_exponent)
        return exponent.where(wide > 0, self.smallest_exponent)  # frexp gives 0 for 0

    def _magnitude(self, magnitude: Tensor) -> Tensor:
        """Number of codes between 0 and a positive value."""
        exponent = self._exponent(magnitude)
        above = (exponent - self.smallest_exponent) * 2**self.mantissa
        return _times_power(magnitude, self.mantissa - exponent) + above


E2M1, E2M3, E4M3 = Float(2, 1, 6.0), Float(2, 3, 7.5), Float(4, 3, 448.0)


def nearest_of(values: Sequence[float], x: Tensor) -> Tensor:
    """For each of ``x`` the nearest of ``values``, which ascend; ties to the larger one. By binary search.

    >>> nearest_of((-2.0, 1.0, 5.0), torch.tensor([-0.5, 3.5])).tolist()
    [1.0, 5.0]
    """
    table = torch.tensor(values, dtype=x.dtype, device=x.device)
    return table[torch.bucketize(x, (table[1:] + table[:-1]) / 2, right=True)]


@functools.cache
def _by_halves(values: tuple[float, ...]) -> Tensor:
    """The nearest of some integers to ``first``, ``first + 0.5``, ..., ``last``, in float64.

    Middles of integers are multiples of a half, so that up to the next half step the nearest stays. A lookup takes a
    tenth of the time of a search among sixteen values, and a quarter among four.
    """
    first, last = values[0], values[-1]
    return nearest_of(values, torch.arange(int(2 * first), int(2 * last) + 1, dtype=torch.float64) / 2)


@dataclass(frozen=True)
class Table:
    """Elements that are given one by one, in ascending order; a code is the place in that order.

    >>> table = Table((-2.0, 1.0, 5.0))
    >>> table.nearest(torch.tensor([-9.0, -0.4, 3.5])).tolist()
    [-2.0, 1.0, 5.0]
    >>> table.code(torch.tensor([-2.0, -0.5, 2.0])).tolist(), table.value(torch.tensor([0.5])).tolist()
    ([0.0, 0.5, 1.25], [-0.5])
    """

    values: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.values) - 1).bit_length()

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest value, ties to the larger one; differentiable as the identity inside the range."""
        clamped = x.clamp(self.values[0], self.values[-1])
        return given(clamped, self._nearest(clamped.detach()))

    def _nearest(self, x: Tensor) -> Tensor:
        """The nearest values of ``x`` within the range: looked up by half steps where all values are integers."""
        if not all(float(value).is_integer() and abs(value) <= 128 for value in self.values):
            return nearest_of(self.values, x)
        halves = _by_halves(self.values).to(x.dtype).to(x.device)
        # What is no number has no place, and comes out as some value, as a search would let it.
        place = (2 * x).floor_().to(torch.int32).sub_(int(2 * self.values[0])).clamp_(0, len(halves) - 1)
        return halves.index_select(0, place.view(-1)).view(x.shape)

    def code(self, values: Tensor) -> Tensor:
        """Codes of values, or positions between codes, as floats; the outer pieces go on beyond the ends."""
        table = torch.tensor(self.values, dtype=values.dtype, device=values.device)
        below = torch.bucketize(values.detach(), table[1:-1], right=True)
        return below + (values - table[below]) / (table[below + 1] - table[below])

    def value(self, codes: Tensor) -> Tensor:
        """Values of codes, or of positions between them: the inverse of ``code``."""
        table = torch.tensor(self.values, dtype=codes.dtype, device=codes.device)
        below = codes.detach().floor().long().clamp(0, len(self.values) - 2)
        return table[below] + (codes - below) * (table[below + 1] - table[below])


# The integers of a dtype's width, the bits of its exponent, and the digits of its mantissa.
_BITS = {torch.float32: (torch.int32, 0x7F80_0000, 23), torch.float64: (torch.int64, 0x7FF0_0000_0000_0000, 52)}


class _Identity(torch.autograd.Function):
    """A given value in place of another, with the identity as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


def given(x: Tensor, value: Tensor) -> Tensor:
    """``value`` with the gradient of ``x``: a straight-through estimator (Bengio et al. 2013)."""
    return _Identity.apply(x, value) if x.requires_grad else value


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2 ** exponent``, exact and differentiable: the gradient of ``ldexp`` itself is 0 below 2 ** 0."""
    return x * torch.ldexp(torch.ones_like(x), exponent)
