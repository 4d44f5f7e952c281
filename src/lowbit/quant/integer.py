"""Integer formats: ``value = (code - zero) * scale``.

Codes are unsigned, ``0 .. 2**bits - 1``; a symmetric format has the zero point ``2**(bits - 1)``. One formula covers
both, and every file format is a relabelling of it. The zero point is an integer in the range of the codes, so that
every file format can store it; the range of a group whose values all have one sign is therefore extended to 0.

Rejected: an additional signed representation, and float zero points (only one runtime has them).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.elements import Int
from lowbit.quant.format import Format, QParams, Zero, round_ste
from lowbit.quant.integer_offsets import rounded_with_offset
from lowbit.quant.scales import Plain, stored_scale
from lowbit.quant.weight_kernel import SCALES

MIN_BITS, MAX_BITS = 2, 8
SEARCHED = (1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # factors on a range that a search tries


@dataclass(frozen=True)
class IntFormat(Format):
    """Integers of 2 to 8 bits with one scale per group.

    Attributes:
        bits: bits per code.
        group: consecutive values of a row that share a scale; ``None``: one group per row (output channel).
        symmetric: the zero point is fixed at the middle of the range.
        scale_dtype: dtype of the stored scales.

    >>> format = IntFormat(2, symmetric=False)
    >>> w = torch.tensor([[-1.0, 0.0, 0.6, 2.0]])
    >>> q = format.qparams(w)
    >>> q.scale.tolist(), q.zero.tolist()
    ([[1.0]], [[1.0]])
    >>> format.fake_quant(w, q).tolist(), format.quantize(w, q).codes.tolist()
    ([[-1.0, 0.0, 1.0, 2.0]], [[0, 1, 2, 3]])
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    scale_dtype: torch.dtype = field(default=torch.float16)

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise LowbitError(f"{self.bits} bits given; {MIN_BITS} to {MAX_BITS} are allowed")
        if self.group is not None and self.group < 2:
            raise LowbitError(f"group size {self.group} given; it must be 2 or more, or omitted")

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        """Every width, groups and rows, with and without a zero point."""
        arguments = [
            (bits, group, symmetric) for bits in range(2, 9) for group in (32, None) for symmetric in (False, True)
        ]
        return tuple(cls(*values) for values in arguments)

    @property
    def levels(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric format."""
        return 2 ** (self.bits - 1)

    @property
    def name(self) -> str:
        """``w4g64-sym``.

        >>> IntFormat(4, 64).name, IntFormat(8, symmetric=False).name
        ('w4g64-sym', 'w8-asym')
        """
        return f"w{self.bits}{f'g{self.group}' if self.group else ''}-{'sym' if self.symmetric else 'asym'}"

    @property
    def elements(self) -> Int:
        """Integers."""
        return Int(self.bits)

    @property
    def scales(self) -> Plain:
        """One number per group."""
        return Plain(self.scale_dtype)

    @property
    def zero(self) -> Zero:
        """Fixed, or one code per group."""
        return "none" if self.symmetric else "code"

    @property
    def independent_ends(self) -> bool:
        """With a zero point a range need not be symmetric."""
        return not self.symmetric

    @property
    def learns_range(self) -> bool:
        """Gradients reach both ends."""
        return True

    @property
    def has_kernel(self) -> bool:
        """With scales in float16 or float32."""
        return self.scale_dtype in SCALES

    def with_bits(self, bits: int) -> IntFormat:
        """The format with another number of bits."""
        return replace(self, bits=bits)

    def bits_per_value(self, columns: int) -> float:
        """Codes, scales and, if asymmetric, zero points.

        >>> IntFormat(4, 128).bits_per_value(4096)
        4.125
        """
        overhead = torch.finfo(self.scale_dtype).bits + (0 if self.symmetric else self.bits)
        return self.bits + overhead * self.groups(columns) / columns

    def from_range(self, low: Tensor, high: Tensor, tensor_peak: Tensor | None = None) -> QParams:
        """Qparams of a range; a symmetric format uses the larger end for both. ``tensor_peak`` has no effect.

        >>> q = IntFormat(2, symmetric=False).from_range(torch.tensor([[-1.0]]), torch.tensor([[2.0]]))
        >>> q.scale.tolist(), q.zero.tolist()
        ([[1.0]], [[1.0]])
        """
        if self.symmetric:
            scale = stored_scale(torch.maximum(high, -low) / (self.levels / 2), self.scale_dtype)
            return QParams(scale, torch.full_like(scale, self.middle))
        scale = stored_scale((high - low) / self.levels, self.scale_dtype)
        return QParams(scale, round_ste(-low / scale).clamp(0, self.levels))

    def range_of(self, qparams: QParams) -> tuple[Tensor, Tensor]:
        """The inverse of ``from_range``: the ends of a range with these qparams.

        >>> q = QParams(torch.tensor([[1.0]]), torch.tensor([[1.0]]))
        >>> low, high = IntFormat(2, symmetric=False).range_of(q)
        >>> low.tolist(), high.tolist()
        ([[-1.0]], [[2.0]])
        """
        scale, zero = qparams
        if self.symmetric:
            half = scale * (self.levels / 2)
            return -half, half
        return -zero * scale, (self.levels - zero) * scale

    def position(self, x: Tensor, qparams: QParams) -> Tensor:
        """``x / scale + zero``."""
        return x / qparams.scale + qparams.zero

    def round(self, x: Tensor, qparams: QParams) -> Tensor:
        """``round(x / scale) + zero``, clamped to the range of the codes."""
        return (round_ste(x / qparams.scale) + qparams.zero).clamp(0, self.levels)

    def value(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``(code - zero) * scale``."""
        return (codes - qparams.zero) * qparams.scale

    def fake_quant_shifted(self, weight: Tensor, offset: Tensor, qparams: QParams) -> Tensor:
        """``(clamp(round(weight / scale + offset) + zero) - zero) * scale``; differentiable in all but the weight.

        In one piece: learned rounding does it for every weight at every step.
        """
        scale, zero = qparams.scale[..., None], qparams.zero[..., None]
        grouped = rounded_with_offset(self.split(weight), self.split(offset), scale, zero, self.levels)
        return self.join(grouped, weight.shape[-1])

    def neighbours(self, qparams: QParams, tensor_peak: Tensor | None = None) -> list[QParams]:
        """Ranges scaled by ``SEARCHED``."""
        low, high = self.range_of(qparams)
        return [self.from_range(low * ratio, high * ratio) for ratio in SEARCHED]

    def fits_scale_dtype(self, qparams: QParams) -> bool:
        """Every scale is below the largest number of ``scale_dtype``."""
        return float(qparams.scale.max()) < torch.finfo(self.scale_dtype).max


def integer(format: Format, what: str) -> IntFormat:
    """``format`` as an integer format, for a ``what`` that holds no other; anything else is refused.

    Raises:
        LowbitError: ``format`` is no integer format.
    """
    if not isinstance(format, IntFormat):
        raise LowbitError(f"{what} holds integer formats; {format.name} given")
    return format
