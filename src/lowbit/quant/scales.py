"""How scales are stored, and the rule that finds one from a group's largest absolute value.

A format's scale is rounded to what can be stored before codes are chosen, so a rule gives the stored scale itself,
differentiable as the identity where it is a rounded quotient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.elements import E2M1, E2M3, E4M3, Float, given

E8M0_BIAS, E8M0_LARGEST = 127, 254  # byte 255 is NaN
NVFP4_LARGEST = E4M3.largest * E2M1.largest  # of an element times its scale, in units of the tensor's scale


@dataclass(frozen=True)
class Plain:
    """Scales stored individually in ``dtype``."""

    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Bits of a scale."""
        return torch.finfo(self.dtype).bits

    def store(self, scale: Tensor) -> Tensor:
        """The nearest scale that can be stored."""
        return stored_scale(scale, self.dtype)

    def holds(self, scale: Tensor) -> bool:
        """Whether scales are stored as they are."""
        return torch.equal(scale.to(self.dtype).to(scale.dtype), scale)


@dataclass(frozen=True)
class PowerOfTwo:
    """Scales that are powers of two, as one byte (E8M0): ``2 ** (byte - 127)``."""

    @property
    def bits(self) -> int:
        """Bits of a scale."""
        return 8

    def rule(self, peak: Tensor, element: Float) -> Tensor:
        """The scale of groups with the largest absolute values ``peak``.

        Rounds the exponent of ``peak`` up from a mantissa of 1.75 (E2M3: 1.9375), as compressed-tensors does: larger
        scales lose precision, smaller ones cut the largest values (OCP's rule cuts up to a quarter).

        Its gradient is that of a scale in proportion to ``peak``, which a power of two is but for rounding: without
        it, a transform that widens a group would seem to leave the group's rounding errors as they are.

        >>> PowerOfTwo().rule(torch.tensor([4.0, 6.9, 7.0]), E2M1).tolist()
        [1.0, 1.0, 2.0]
        """
        wide = peak.detach() if peak.dtype in (torch.float32, torch.float64) else peak.detach().float()
        mantissa, exponent = torch.frexp(wide)
        up_from = 1.9375 if element == E2M3 else 1.75
        exponent = exponent - 1 + (mantissa >= up_from / 2).int() - element.largest_exponent
        # Above, the largest element times the scale is no float32 number.
        exponent = exponent.clamp(max=E8M0_BIAS - element.largest_exponent)
        scale = power_of_two(exponent.where(wide > 0, -E8M0_BIAS), peak.dtype)
        if not peak.requires_grad:
            return scale
        share = (scale / peak.detach()).where(wide > 0, 0.0)
        return given(peak * share, scale)

    def moved(self, scale: Tensor, factor: float) -> Tensor:
        """``scale`` times a power of two; what has no byte stays, such as half the smallest scale, that of zeros.

        >>> PowerOfTwo().moved(torch.tensor([1.0, 2.0**-127]), 0.5).tolist() == [0.5, 2.0**-127]
        True
        """
        moved = scale * factor
        return moved.where((torch.frexp(moved.float())[1] - 1).abs() <= E8M0_BIAS, scale)

    def holds(self, scale: Tensor) -> bool:
        """Whether scales are powers of two of one byte."""
        mantissa, exponent = torch.frexp(scale.float())
        inside = (exponent - 1).abs().max() <= E8M0_BIAS
        return bool((mantissa == 0.5).all()) and bool(inside)

    def to_bytes(self, scale: Tensor) -> Tensor:
        """Scales as bytes.

        >>> PowerOfTwo().to_bytes(torch.tensor([1.0, 2.0, 0.125])).tolist()
        [127, 128, 124]
        """
        return (torch.frexp(scale.float()).exponent - 1 + E8M0_BIAS).to(torch.uint8)

    def from_bytes(self, stored: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The inverse of ``to_bytes``."""
        return power_of_two(stored.int() - E8M0_BIAS, dtype)


@dataclass(frozen=True)
class TwoLevel:
    """E4M3 scales over one power of two for the whole tensor: ``scale / 2 ** k``.

    A power of two keeps every product within bfloat16, so that decoders that divide by it or multiply by its
    reciprocal, in float32 or in bfloat16, give the same values bit for bit. It costs at most a tenth of a per cent of
    the mean square error.
    """

    @property
    def bits(self) -> int:
        """Bits of a group's scale."""
        return 8

    def rule(self, peak: Tensor, tensor_peak: Tensor, largest_element: float) -> Tensor:
        """The scale of groups with the largest absolute values ``peak``.

        Args:
            peak: ``(rows, groups)``.
            tensor_peak: the largest absolute value of the tensor, or of all tensors that share its scale.
            largest_element: 6 for E2M1.

        >>> peak = torch.tensor([[0.9]])
        >>> (TwoLevel().rule(peak, peak.max(), 6.0) * 2048).tolist()
        [[320.0]]
        """
        outer = power_of_two(outer_exponent(tensor_peak), peak.dtype)
        inner = E4M3.nearest(peak * outer / largest_element).clamp(min=2.0**-9)
        return inner / outer

    def holds(self, scale: Tensor) -> bool:
        """Whether there is one power of two with which all scales are E4M3 numbers."""
        return shared_exponent([scale]) is not None

    def split(self, scale: Tensor, exponent: int) -> Tensor:
        """The E4M3 scales with ``2 ** exponent`` as the tensor's divisor."""
        return torch.ldexp(scale, torch.tensor(exponent)).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Integers:
    """Scales that are integers of ``bits`` bits up to ``largest``, times a float16 of 256 values.

    Attributes:
        bits: of an integer.
        largest: the largest integer.
        signed: integers go down to ``-largest - 1``; scales found from a range are never negative.
    """

    bits: int
    largest: int
    signed: bool = False

    def holds(self, scale: Tensor) -> bool:
        """Whether scales ``(rows, groups of a superblock)`` are such products."""
        return bool(split_scales(scale, self)[2].all())


Scales = Plain | PowerOfTwo | TwoLevel | Integers


def outer_exponent(tensor_peak: Tensor) -> Tensor:
    """``floor(log2(2688 / peak))``: the largest power of two that keeps all scales within E4M3; 0 for zeros.

    >>> int(outer_exponent(torch.tensor(0.9)))
    11
    """
    wide = tensor_peak.detach().double()
    exponent = torch.frexp(NVFP4_LARGEST / wide.clamp(min=1e-300)).exponent - 1
    return exponent.where(wide > 0, torch.zeros_like(exponent)).clamp(-100, 100)


def shared_exponent(scales: list[Tensor]) -> int | None:
    """The largest ``k`` with which all ``scale * 2 ** k`` are E4M3 numbers; ``None`` if there is none.

    Linears that a runtime fuses share the divisor of their tensors.

    >>> shared_exponent([torch.tensor([320 / 2048, 2 / 2048])])
    11
    """
    values = torch.cat([scale.flatten().double() for scale in scales])
    start = int(torch.frexp(E4M3.largest / values.max()).exponent) - 1
    for exponent in range(start, start - 24, -1):
        moved = torch.ldexp(values, torch.tensor(exponent))
        if torch.equal(E4M3.nearest(moved), moved):
            return exponent
    return None


def split_scales(products: Tensor, kind: Integers) -> tuple[Tensor, Tensor, Tensor]:
    """Float16 factors and integers whose products are given, ``(..., groups of a superblock)``.

    Returns the factors ``(..., 1)``, the integers, and whether they were found ``(..., 1)``. The products determine
    them up to a common divisor of the integers, which leaves every value the same; the smallest factor is given, and
    a negative one only where the products need it.

    >>> factor, integers, found = split_scales(torch.tensor([0.75, 0.25, 0.5]), Integers(6, 63))
    >>> float(factor) * integers.tolist()[0], bool(found)
    (0.75, True)
    >>> [x.tolist() for x in split_scales(torch.tensor([4.0, -3.0]), Integers(3, 3, signed=True))[:2]]
    [[-1.0], [-4.0, 3.0]]
    """
    wide = products.double()
    top = wide.abs().amax(-1, keepdim=True)
    factor, integers = torch.ones_like(top), torch.zeros_like(wide)
    found = top == 0
    factor = factor.where(~found, 0.0)
    least = -kind.largest - 1 if kind.signed else 0
    counts = [sign * count for sign in (1, -1) for count in range(kind.largest + kind.signed, 0, -1)]
    for count in counts:
        if bool(found.all()):
            break
        candidate = (top / count).half().double()
        parts = (wide / candidate.where(candidate != 0, 1.0)).round()
        exact = (candidate != 0) & (parts * candidate == wide).all(-1, keepdim=True)
        exact &= (parts.amin(-1, keepdim=True) >= least) & (parts.amax(-1, keepdim=True) <= kind.largest)
        new = exact & ~found
        factor, integers, found = candidate.where(new, factor), parts.where(new, integers), found | exact
    return factor, integers, found


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``2 ** exponent``, limited to what one byte and ``dtype`` hold; exact."""
    info = torch.finfo(dtype)
    smallest = max(
        -E8M0_BIAS, torch.frexp(torch.tensor(info.smallest_normal * info.eps).double()).exponent.item() - 1
    )
    largest = min(E8M0_BIAS, torch.frexp(torch.tensor(info.max).double()).exponent.item() - 1)
    limited = exponent.clamp(int(smallest), int(largest))
    return torch.ldexp(torch.ones_like(limited, dtype=torch.float64), limited).to(dtype)


class _Store(torch.autograd.Function):
    """A round trip through a storage dtype with the identity as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


def round_trip(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` cast to ``dtype`` and back; differentiable as the identity."""
    return _Store.apply(x, dtype)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to ``dtype``, never 0 or infinite; differentiable as the identity.

    A scale below the smallest positive number of the dtype becomes that number: a row of zeros stays exact, and very
    small values keep the precision that the format has. If the scale's own dtype has a narrower range, that applies.

    >>> stored_scale(torch.tensor([0.1, 0.0]), torch.float16).tolist()
    [0.0999755859375, 5.960464477539063e-08]
    """
    infos = [torch.finfo(dtype), torch.finfo(scale.dtype)]
    smallest = max(info.smallest_normal * info.eps for info in infos)  # the smallest subnormal
    return _Store.apply(scale.clamp(smallest, min(info.max for info in infos)), dtype)
