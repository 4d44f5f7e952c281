"""Number formats: elements, scales, zero points, and the only rounding formulas of the project.

A format defines how the numbers of one tensor are stored, not how its scales are chosen. All quantization goes
through its methods, and exporters read only ``QTensor``. Three rules hold for every format:

* The scale is rounded to its stored precision *before* codes are chosen, so that simulated and stored weights are
  equal bit for bit; rounding the scale afterwards would change every value.
* ``format.quantize(w, q).dequantize() == format.fake_quant(w, q)``, bit for bit, in every dtype.
* Codes and values come from the format (``round``, ``position``, ``value``): no method or exporter repeats the
  formula or depends on how a zero point is stored.

Rejected: tensor subclasses (they hide the arithmetic that this project is about).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant import inductor

Zero = Literal["none", "code"]
Factor = Tensor | float


@dataclass(frozen=True)
class Int:
    """Integer elements of ``bits`` bits; a code is the integer itself."""

    bits: int


@dataclass(frozen=True)
class Plain:
    """Scales stored individually in ``dtype``."""

    dtype: torch.dtype


class QParams(NamedTuple):
    """Scale and zero point of each group: ``value = (code - zero) * scale``.

    Both are ``(rows, groups)`` in the compute dtype; ``scale`` holds values that the format can store, ``zero`` holds
    codes. ``Format.per_column`` expands them to columns.
    """

    scale: Tensor
    zero: Tensor

    def to(self, device: torch.device | str) -> QParams:
        """The qparams on another device."""
        return QParams(self.scale.to(device), self.zero.to(device))


@dataclass(frozen=True)
class QTensor:
    """A quantized weight: the only input of an exporter.

    Attributes:
        codes: ``uint8 (rows, columns)``.
        qparams: scale and zero point, ``(rows, groups)`` each.
        format: the format of the codes.
    """

    codes: Tensor
    qparams: QParams
    format: Format

    def dequantize(self) -> Tensor:
        """The dequantized weight ``(rows, columns)``, in the dtype of the qparams."""
        return self.format.dequantize(self.codes, self.qparams)

    def to(self, device: torch.device | str) -> QTensor:
        """The same weight on another device."""
        return QTensor(self.codes.to(device), self.qparams.to(device), self.format)

    def select_rows(self, order: Tensor) -> QTensor:
        """The rows ``order``, in that order."""
        return QTensor(self.codes[order], QParams(*(x[order] for x in self.qparams)), self.format)

    @property
    def stored_bits(self) -> float:
        """Stored bits of codes, scales and zero points."""
        return self.codes.numel() * self.format.bits_per_value(self.codes.shape[-1])


class Format(ABC):
    """How the numbers of one weight are stored; implementations are frozen dataclasses."""

    @classmethod
    @abstractmethod
    def examples(cls) -> tuple[Format, ...]:
        """Formats of this kind for the contract tests, the hardest first; groups of 32 or rows of 64 values."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in schemes and messages, such as ``w4g64-sym``."""

    @property
    @abstractmethod
    def elements(self) -> Int:
        """The type of a code."""

    @property
    @abstractmethod
    def group(self) -> int | None:
        """Consecutive values of a row that share a scale; ``None``: the whole row."""

    @property
    @abstractmethod
    def scales(self) -> Plain:
        """How scales are stored."""

    @property
    @abstractmethod
    def zero(self) -> Zero:
        """``none``: the format fixes the zero point; ``code``: each group has an integer zero point."""

    @property
    @abstractmethod
    def independent_ends(self) -> bool:
        """Both ends of a group's range are independent; otherwise the larger end determines both."""

    @abstractmethod
    def bits_per_value(self, columns: int) -> float:
        """Stored bits per value of a row: codes, scales and zero points."""

    @abstractmethod
    def from_range(self, low: Tensor, high: Tensor) -> QParams:
        """Qparams of the range from ``low`` (0 or less) to ``high`` (0 or more), ``(rows, groups)`` each.

        Differentiable in both.
        """

    @abstractmethod
    def range_of(self, qparams: QParams) -> tuple[Tensor, Tensor]:
        """The inverse of ``from_range``: a range with these qparams."""

    @abstractmethod
    def position(self, x: Tensor, qparams: QParams) -> Tensor:
        """``x`` in units of codes, neither rounded nor clamped; qparams broadcast against ``x``."""

    @abstractmethod
    def round(self, x: Tensor, qparams: QParams) -> Tensor:
        """The nearest codes, as floats; qparams broadcast against ``x``. Differentiable inside the range."""

    @abstractmethod
    def value(self, codes: Tensor, qparams: QParams) -> Tensor:
        """The values of codes, or of positions between codes; qparams broadcast against ``codes``."""

    @abstractmethod
    def fits_scale_dtype(self, qparams: QParams) -> bool:
        """No scale is clamped to the largest number of its stored precision."""

    def groups(self, columns: int) -> int:
        """Number of groups in a row of ``columns`` values.

        Raises:
            LowbitError: the group size does not divide ``columns``.
        """
        size = self.group or columns
        if columns % size:
            advice = group_advice(columns) or "none from 16 to 256 does: leave the group out for one scale per row"
            raise LowbitError(f"group size {size} does not divide a width of {columns}; {advice}")
        return columns // size

    def ends(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of each group's range, 0 included, ``(rows, groups)`` each; differentiable."""
        grouped = split_groups(weight, self.groups(weight.shape[-1]))
        return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)

    def qparams(self, weight: Tensor, low: Factor = 1.0, high: Factor = 1.0) -> QParams:
        """Qparams that span each group's range, its ends shrunk by the clipping ratios ``low`` and ``high``.

        Args:
            weight: ``(rows, columns)``.
            low: factor on each group's minimum, ``(rows, groups)`` or a number; 1 keeps the range.
            high: the same for the maximum.

        The range always includes 0. Differentiable in all three.
        """
        bottom, top = self.ends(weight)
        return self.from_range(bottom * low, top * high)

    def fake_quant(self, weight: Tensor, qparams: QParams) -> Tensor:
        """``weight`` ``(rows, columns)`` rounded to nearest: ``quantize(...).dequantize()``, bit for bit.

        Differentiable in the weight and the qparams (straight-through rounding). Fused within ``inductor.on()``.
        """
        if inductor.active(weight):
            return inductor.compiled(_fake_quant, self)(weight, *qparams)
        return _fake_quant(weight, *qparams, self)

    def fake_quant_clipped(self, weight: Tensor, low: Factor = 1.0, high: Factor = 1.0) -> Tensor:
        """``fake_quant(weight, qparams(weight, low, high))``, with the ranges also fused within ``inductor.on()``."""
        if not inductor.active(weight):
            return self.fake_quant(weight, self.qparams(weight, low, high))
        bottom, top = inductor.compiled(_ends, self)(weight)
        return self.fake_quant(weight, self.from_range(bottom * low, top * high))

    def quantize(self, weight: Tensor, qparams: QParams) -> QTensor:
        """``weight`` ``(rows, columns)`` rounded to the nearest codes."""
        with torch.no_grad():
            grouped = split_groups(weight, self.groups(weight.shape[-1]))
            codes = self.round(grouped, _per_group(qparams)).flatten(-2).to(torch.uint8)
        return QTensor(codes, QParams(*(x.detach() for x in qparams)), self)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """The values of codes, or positions between codes, ``(rows, columns)``, in the dtype of the qparams."""
        grouped = split_groups(codes.to(qparams.scale.dtype), qparams.scale.shape[-1])
        return self.value(grouped, _per_group(qparams)).flatten(-2)

    def per_column(self, qparams: QParams, columns: int) -> QParams:
        """The qparams of each value, ``(rows, columns)``."""
        size = columns // qparams.scale.shape[-1]
        return QParams(*(x.repeat_interleave(size, -1) for x in qparams))


def _fake_quant(weight: Tensor, scale: Tensor, zero: Tensor, format: Format) -> Tensor:
    qparams = _per_group(QParams(scale, zero))
    grouped = split_groups(weight, scale.shape[-1])
    return format.value(format.round(grouped, qparams), qparams).flatten(-2)


def _ends(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    return format.ends(weight)


def _per_group(qparams: QParams) -> QParams:
    """``(rows, groups)`` as ``(rows, groups, 1)``."""
    return QParams(qparams.scale[..., None], qparams.zero[..., None])


def split_groups(x: Tensor, groups: int) -> Tensor:
    """``(rows, columns) -> (rows, groups, columns / groups)``."""
    return x.unflatten(-1, (groups, -1))


def usable_group_sizes(columns: int) -> list[int]:
    """Divisors of ``columns`` from 16 to 256 that are multiples of 16: the sizes that runtimes support.

    >>> usable_group_sizes(576)
    [16, 32, 48, 64, 96, 144, 192]
    """
    return [g for g in range(16, 257, 16) if columns % g == 0 and g <= columns]


def group_advice(columns: int) -> str | None:
    """The sizes that fit, as the end of a message; ``None`` if there is none.

    >>> group_advice(96), group_advice(100)
    ('usable sizes: 16, 32, 48, 96', None)
    """
    sizes = usable_group_sizes(columns)
    return f"usable sizes: {', '.join(map(str, sizes))}" if sizes else None


class _Round(torch.autograd.Function):
    """Rounding to the nearest integer (ties to even) with the identity as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0]


def round_ste(x: Tensor) -> Tensor:
    """``round(x)`` whose gradient is 1 everywhere (straight-through estimator; Bengio et al. 2013)."""
    # The plain operation where no gradient is needed: GPTQ rounds column by column, thousands of small tensors.
    return _Round.apply(x) if x.requires_grad else x.round()


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
