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
from lowbit.finite import is_finite
from lowbit.quant import inductor, weight_kernel
from lowbit.quant.elements import Float, Int, Table
from lowbit.quant.scales import Scales

Zero = Literal["none", "code", "offset"]
Factor = Tensor | float


class QParams(NamedTuple):
    """Scale and zero point of each group, ``(rows, groups)`` each in the compute dtype.

    ``scale`` holds effective scales: products of what a format stores on several levels, which are exact.
    ``zero`` is the code of 0, or, for a format whose groups have a minimum (``offset``), that minimum:
    ``value = (code - zero) * scale`` or ``code * scale - zero`` for integers. ``Format.per_column`` expands both.
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
    def elements(self) -> Int | Float | Table:
        """The type of a code."""

    @property
    @abstractmethod
    def group(self) -> int | None:
        """Consecutive values of a row that share a scale; ``None``: the whole row."""

    @property
    @abstractmethod
    def scales(self) -> Scales:
        """How scales are stored."""

    @property
    @abstractmethod
    def zero(self) -> Zero:
        """``none``: the format fixes the zero point; ``code``: a group has an integer one; ``offset``: a minimum."""

    @property
    @abstractmethod
    def independent_ends(self) -> bool:
        """Both ends of a group's range are independent; otherwise the larger end determines both."""

    @property
    @abstractmethod
    def learns_range(self) -> bool:
        """Gradients reach the ends of a range; otherwise scales can only be searched."""

    @abstractmethod
    def bits_per_value(self, columns: int) -> float:
        """Stored bits per value of a row: codes, scales and zero points."""

    @abstractmethod
    def from_range(self, low: Tensor, high: Tensor, tensor_peak: Tensor | None = None) -> QParams:
        """Qparams of the range from ``low`` (0 or less) to ``high`` (0 or more), ``(rows, groups)`` each.

        Differentiable in both where ``learns_range``. ``tensor_peak`` is the largest absolute value of all tensors
        that share a scale of the whole tensor; without it this tensor's own. Most formats have no such scale.
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
    def neighbours(self, qparams: QParams, tensor_peak: Tensor | None = None) -> list[QParams]:
        """Qparams next to ``qparams`` that the format can store: candidates for ``search_scales``.

        ``tensor_peak`` is the one that ``qparams`` were made with: all candidates share the tensor's scale.
        """

    @abstractmethod
    def fits_scale_dtype(self, qparams: QParams) -> bool:
        """No scale is clamped to the largest number of its stored precision."""

    def groups(self, columns: int) -> int:
        """Number of groups in a row of ``columns`` values.

        Raises:
            LowbitError: the group size does not divide ``columns``, and the format has no smaller last group.
        """
        size = self.group or columns
        if columns % size and not self.smaller_last_group:
            advice = group_advice(columns) or "none from 16 to 256 does: leave the group out for one scale per row"
            raise LowbitError(f"group size {size} does not divide a width of {columns}; {advice}")
        return -(-columns // size)

    def split(self, x: Tensor) -> Tensor:
        """``(rows, columns)`` as ``(rows, groups, size)``, a smaller last group filled up with zeros."""
        columns = x.shape[-1]
        size = self.group or columns
        if columns % size:
            x = torch.nn.functional.pad(x, (0, -columns % size))
        return split_groups(x, x.shape[-1] // size)

    def join(self, grouped: Tensor, columns: int) -> Tensor:
        """The inverse of ``split``."""
        flat = grouped.flatten(-2)
        return flat if flat.shape[-1] == columns else flat[..., :columns]

    def ends(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of each group's range, 0 included, ``(rows, groups)`` each; differentiable."""
        self.groups(weight.shape[-1])  # refuses a width that groups do not divide
        grouped = self.split(weight)
        return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)

    def nearest(self, x: Tensor, qparams: QParams) -> Tensor:
        """The nearest values, ``value(round(x))``; differentiable inside the range; qparams broadcast."""
        return self.value(self.round(x, qparams), qparams)

    @property
    def width_unit(self) -> int:
        """The number of which widths are multiples: the group, or 1 where a row is one or the last may be smaller."""
        return 1 if self.smaller_last_group else self.group or 1

    @property
    def smaller_last_group(self) -> bool:
        """Whether a width need not be a multiple of the group: the rest is a group of its own."""
        return False

    @property
    def has_kernel(self) -> bool:
        """Whether ``weight_kernel`` quantizes weights in this format."""
        return False

    @property
    def shares_rows(self) -> bool:
        """Whether several rows share a scale."""
        return False

    def over_shared_rows(self, per_group: Tensor) -> Tensor:
        """Sums over the rows that share a scale, for each row, of figures ``(rows, groups)``."""
        return per_group

    def qparams(
        self, weight: Tensor, low: Factor = 1.0, high: Factor = 1.0, tensor_peak: Tensor | None = None
    ) -> QParams:
        """Qparams that span each group's range, its ends shrunk by the clipping ratios ``low`` and ``high``.

        Args:
            weight: ``(rows, columns)``.
            low: factor on each group's minimum, ``(rows, groups)`` or a number; 1 keeps the range.
            high: the same for the maximum.
            tensor_peak: as for ``from_range``.

        The range always includes 0. Differentiable in all three.
        """
        bottom, top = self.ends(weight)
        return self.from_range(bottom * low, top * high, tensor_peak)

    def fake_quant(self, weight: Tensor, qparams: QParams) -> Tensor:
        """``weight`` ``(rows, columns)`` rounded to nearest: ``quantize(...).dequantize()``, bit for bit.

        Differentiable in the weight and the qparams (straight-through rounding). Fused within ``inductor.on()``.
        """
        if inductor.active(weight):
            return inductor.compiled(_fake_quant, self)(weight, *qparams)
        return _fake_quant(weight, *qparams, self)

    def fake_quant_clipped(
        self, weight: Tensor, low: Factor = 1.0, high: Factor = 1.0, tensor_peak: Tensor | None = None
    ) -> Tensor:
        """``fake_quant(weight, qparams(weight, ...))``, with the ranges also fused within ``inductor.on()``.

        Within ``weight_kernel.on()`` integers take one kernel for all of it.
        """
        if self.has_kernel and weight_kernel.takes(weight, self.group):
            return weight_kernel.fake_quant(weight, self, low, high)  # type: ignore[arg-type]
        if not inductor.active(weight):
            return self.fake_quant(weight, self.qparams(weight, low, high, tensor_peak))
        bottom, top = inductor.compiled(_ends, self)(weight)
        return self.fake_quant(weight, self.from_range(bottom * low, top * high, tensor_peak))

    def shifted(self, x: Tensor, offset: Tensor, qparams: QParams) -> Tensor:
        """``x`` moved by ``offset`` codes, ``x`` itself where that is 0; qparams broadcast against ``x``.

        Differentiable in all three.
        """
        position = self.position(x, qparams)
        return x + (self.value(position + offset, qparams) - self.value(position, qparams))

    def fake_quant_shifted(self, weight: Tensor, offset: Tensor, qparams: QParams) -> Tensor:
        """``weight`` moved by ``offset`` codes and rounded to nearest, ``(rows, columns)`` each.

        Differentiable in all three (straight-through rounding), except that a format may leave the weight out.

        >>> from lowbit.quant.floating import MXFP4
        >>> weight = torch.tensor([[4.5, 2.4]]).repeat(1, 16)
        >>> offset = torch.tensor([[0.3, 0.3]]).repeat(1, 16)
        >>> qparams = MXFP4.qparams(weight)
        >>> MXFP4.fake_quant(weight, qparams)[0, :2].tolist()
        [4.0, 2.0]
        >>> MXFP4.fake_quant_shifted(weight, offset, qparams)[0, :2].tolist()  # 5.1 between 4 and 6, 2.7 of 2 and 3
        [6.0, 3.0]
        """
        per_group = _per_group(qparams)
        moved = self.shifted(self.split(weight), self.split(offset), per_group)
        return self.join(self.nearest(moved, per_group), weight.shape[-1])

    def quantize(self, weight: Tensor, qparams: QParams) -> QTensor:
        """``weight`` ``(rows, columns)`` rounded to the nearest codes.

        Raises:
            LowbitError: a value is NaN or infinite, which no code stands for.
        """
        if not is_finite(weight):
            raise LowbitError(f"{self.name}: a weight is NaN or infinite, which no code stands for: read it again")
        with torch.no_grad():
            codes = self.round(self.split(weight), _per_group(qparams))
            codes = self.join(codes, weight.shape[-1]).to(torch.uint8)
        return QTensor(codes, QParams(*(x.detach() for x in qparams)), self)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """The values of codes, or positions between codes, ``(rows, columns)``, in the dtype of the qparams."""
        grouped = self.split(codes.to(qparams.scale.dtype))
        return self.join(self.value(grouped, _per_group(qparams)), codes.shape[-1])

    def per_column(self, qparams: QParams, columns: int) -> QParams:
        """The qparams of each value, ``(rows, columns)``."""
        size = self.group or columns
        return QParams(*(x.repeat_interleave(size, -1)[..., :columns] for x in qparams))


def _fake_quant(weight: Tensor, scale: Tensor, zero: Tensor, format: Format) -> Tensor:
    qparams = _per_group(QParams(scale, zero))
    return format.join(format.nearest(format.split(weight), qparams), weight.shape[-1])


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
