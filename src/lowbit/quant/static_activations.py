"""Activation formats with numbers that are calibrated for each linear's input and stored with its weight.

A dynamic format finds its range in the values that it quantizes; a static one is given qparams, which a run finds
once, in the precision in which they are stored, and before any code is chosen. Until then the range is that of the
values at hand, which is what a search over transforms compares its candidates with.

The arithmetic is that of ``compressed-tensors`` 0.20, operation for operation, in the dtype of the activations. For a
static range it is that of ``IntegerActs``; for NVFP4, ``dynamic: local`` there, the scales of groups are found on the
fly and only the scale of the whole tensor is stored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.activations import ActFormat, IntegerActs
from lowbit.quant.elements import E2M1, E4M3
from lowbit.quant.format import QParams
from lowbit.quant.layout import Stored
from lowbit.quant.scales import outer_exponent, power_of_two

MOST_EXPONENT = 100  # of an NVFP4 input's power of two, as of a weight's
SMALLEST_SCALE = 0.125  # of a group of zeros, in units of the tensor's scale; any positive number gives zeros


class StaticActs(ActFormat):
    """A format with calibrated qparams of the whole tensor, ``(1,)`` each and float32: scale and zero point."""

    @property
    def clippable(self) -> bool:
        """A clipped range is simply another range, which is stored: nothing stays online."""
        return False

    @property
    @abstractmethod
    def learns_range(self) -> bool:
        """Gradients reach the ends of a range."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Stored]:
        """The stored tensors by their names within a module."""

    @abstractmethod
    def qparams(self, low: Tensor, high: Tensor) -> QParams:
        """Qparams, as they are stored, of the range from ``low`` (0 or less) to ``high`` (0 or more).

        Args:
            low, high: ``(1,)`` float32; differentiable where ``learns_range``.
        """

    @abstractmethod
    def range_of(self, qparams: QParams) -> tuple[Tensor, Tensor]:
        """A range with these qparams, up to a rounding error of its ends."""

    @abstractmethod
    def on_qparams(self, x: Tensor, qparams: QParams) -> Tensor:
        """``x`` ``(..., width)`` quantized and dequantized; differentiable in all three."""

    @abstractmethod
    def pack(self, qparams: QParams) -> dict[str, Tensor]:
        """Qparams as the stored tensors, copies: a file has no tensors that share memory."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor]) -> QParams:
        """The inverse of ``pack``, of tensors with the dtypes and shapes of ``tensors``.

        Raises:
            ValueError: a number that no qparams have; they may come from a broken file.
        """

    def fake_quant(self, x: Tensor) -> Tensor:
        """``x`` quantized in the range of its own values, as for an input that is not calibrated yet."""
        low, high = (end.float().reshape(1) for end in (x.amin().clamp(max=0), x.amax().clamp(min=0)))
        return self.on_qparams(x, self.qparams(low, high))


def quantize_input(x: Tensor, format: ActFormat, qparams: QParams | None) -> Tensor:
    """A linear's input ``(..., width)`` in its format, with its qparams where the format is static and they exist."""
    if qparams is None:
        return format.fake_quant(x)
    assert isinstance(format, StaticActs), f"{format.name} has no qparams"
    return format.on_qparams(x, qparams)


@dataclass(frozen=True)
class StaticIntegers(IntegerActs, StaticActs):
    """Integers whose ranges are the same for all tokens; subclasses say how many ranges and how they are stored."""

    @property
    def learns_range(self) -> bool:
        """Both ends, or the larger one."""
        return True

    def qparams(self, low: Tensor, high: Tensor) -> QParams:
        """See ``StaticActs``; of ends ``(1,)``, of one for each channel, or of any other shape."""
        scale, zero = self.from_range(low.clamp(max=0), high.clamp(min=0))
        return QParams(scale, torch.zeros_like(scale) if zero is None else zero)

    def range_of(self, qparams: QParams) -> tuple[Tensor, Tensor]:
        """See ``StaticActs``."""
        low_code, high_code = self.codes
        if self.symmetric:
            peak = qparams.scale * ((2**self.bits - 1) / 2)
            return -peak, peak
        return (low_code - qparams.zero) * qparams.scale, (high_code - qparams.zero) * qparams.scale

    def on_qparams(self, x: Tensor, qparams: QParams) -> Tensor:
        """See ``StaticActs``; qparams of each channel apply to it alone."""
        scale, zero = (value.to(x.dtype) for value in qparams)
        return self.on_range(x, scale, None if self.symmetric else zero)


@dataclass(frozen=True)
class StaticInt(StaticIntegers):
    """Integers of 2 to 16 bits with one range for all tokens.

    >>> format = StaticInt(8, symmetric=False)
    >>> qparams = format.qparams(torch.tensor([-1.2]), torch.tensor([2.6]))
    >>> round(float(qparams.scale), 7), float(qparams.zero)
    (0.014902, -47.0)
    >>> format.on_qparams(torch.tensor([-1.2, 0.3, 9.0]), qparams).tolist()
    [-1.2070587873458862, 0.29803919792175293, 2.5929410457611084]
    """

    most_bits: ClassVar[int] = 16

    @property
    def name(self) -> str:
        """``a8-asym-static``."""
        return f"{super().name}-static"

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """``input_scale`` and, unless symmetric, ``input_zero_point``, a signed code."""
        scale = {"input_scale": Stored(torch.float32, (1,))}
        return scale if self.symmetric else {**scale, "input_zero_point": Stored(self._code_dtype, (1,))}

    @property
    def _code_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits <= 8 else torch.int16

    def pack(self, qparams: QParams) -> dict[str, Tensor]:
        """See ``StaticActs``."""
        values = {"input_scale": qparams.scale, "input_zero_point": qparams.zero}
        return {name: values[name].detach().to(stored.dtype, copy=True) for name, stored in self.tensors.items()}

    def unpack(self, stored: Mapping[str, Tensor]) -> QParams:
        """See ``StaticActs``."""
        scale, zero = stored["input_scale"], stored.get("input_zero_point")
        if not bool(scale.isfinite() & (scale > 0)):
            raise ValueError(f"input_scale is {float(scale)}; a positive number is allowed")
        zero = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
        low_code, high_code = self.codes
        if not low_code <= float(zero) <= high_code:
            raise ValueError(f"input_zero_point is {int(zero)}; {low_code} to {high_code} are allowed")
        return QParams(scale, zero)


@dataclass(frozen=True)
class Nvfp4Acts(StaticActs):
    """NVFP4: E2M1 in groups of 16 with an E4M3 scale found on the fly, over one stored power of two.

    The power of two is stored as a divisor, ``input_global_scale``; the scale of the qparams is its reciprocal.

    >>> format = Nvfp4Acts()
    >>> qparams = format.qparams(torch.tensor([-0.9]), torch.tensor([0.75]))
    >>> float(1 / qparams.scale), format.pack(qparams)["input_global_scale"].tolist()
    (2048.0, [2048.0])
    >>> format.on_qparams(torch.tensor([0.6, -0.3, 0.1, 0.05, -0.9] + [0.0] * 11), qparams)[:5].tolist()
    [0.625, -0.3125, 0.078125, 0.078125, -0.9375]
    """

    group: ClassVar[int] = 16

    @property
    def name(self) -> str:
        """``nvfp4``."""
        return "nvfp4"

    @property
    def independent_ends(self) -> bool:
        """Symmetric: the larger end decides."""
        return False

    @property
    def learns_range(self) -> bool:
        """Powers of two are not learned."""
        return False

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """``input_global_scale``."""
        return {"input_global_scale": Stored(torch.float32, (1,))}

    def check_width(self, width: int) -> None:
        """Refuse a width that groups do not divide."""
        if width % self.group:
            raise LowbitError(
                f"inputs in {self.name} have groups of {self.group}, which do not divide a width of {width}: choose "
                "another scheme, or leave this module in float"
            )

    def qparams(self, low: Tensor, high: Tensor) -> QParams:
        """See ``StaticActs``: the largest power of two that keeps the groups' scales within E4M3."""
        exponent = outer_exponent(torch.maximum(-low, high))
        return QParams(power_of_two(-exponent, low.dtype), torch.zeros_like(low))

    def range_of(self, qparams: QParams) -> tuple[Tensor, Tensor]:
        """See ``StaticActs``: the widest such range."""
        peak = qparams.scale * (E4M3.largest * E2M1.largest)
        return -peak, peak

    def on_qparams(self, x: Tensor, qparams: QParams) -> Tensor:
        """See ``StaticActs``; a group beyond the calibrated range is clipped at the largest scale."""
        outer = qparams.scale.to(x.dtype)
        grouped = x.unflatten(-1, (-1, self.group))
        peak = grouped.abs().amax(-1, keepdim=True)
        inner = E4M3.nearest(peak / E2M1.largest / outer)
        scale = torch.where(inner == 0, SMALLEST_SCALE, inner) * outer
        return (E2M1.nearest(grouped / scale) * scale).flatten(-2)

    def pack(self, qparams: QParams) -> dict[str, Tensor]:
        """See ``StaticActs``."""
        return {"input_global_scale": 1 / qparams.scale.detach().float()}

    def unpack(self, stored: Mapping[str, Tensor]) -> QParams:
        """See ``StaticActs``."""
        divisor = stored["input_global_scale"]
        mantissa, exponent = torch.frexp(divisor)
        if not bool((mantissa == 0.5) & ((exponent - 1).abs() <= MOST_EXPONENT)):
            raise ValueError(
                f"input_global_scale is {float(divisor)}; powers of two from 2^-{MOST_EXPONENT} to 2^{MOST_EXPONENT} "
                "are allowed"
            )
        return QParams(1 / divisor, torch.zeros_like(divisor))


NVFP4_ACTS = Nvfp4Acts()
