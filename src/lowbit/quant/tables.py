"""Formats whose elements are a table: llama.cpp's IQ4_NL and Q2_0.

``value = table[code] * d`` with a float16 ``d`` for a group. Neither table is symmetric, so ``d`` takes the sign with
which the longer side of the table covers the group's largest value.

========== ======================================== ======= =======================================================
name       table                                    group   note
========== ======================================== ======= =======================================================
``iq4_nl`` 16 values from -127 to 113               32      denser around zero, as weights are
``q2_0``   -1, 0, 1, 2                              64      holds symmetric 2-bit integers, with ``d = -scale``
========== ======================================== ======= =======================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.elements import Table
from lowbit.quant.format import Format, QParams, Zero
from lowbit.quant.scales import Plain

IQ4_NL_TABLE = Table((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
Q2_0_TABLE = Table((-1, 0, 1, 2))


@dataclass(frozen=True)
class TableFormat(Format):
    """Elements of a table times a scale of either sign.

    Attributes:
        label: the name in schemes.
        elements: the table.
        group: values that share a scale.
        searched: the elements, or numbers between them, to which a search of scales maps a group's largest value.
        scale_dtype: of the stored scales.

    >>> w = torch.full((1, 32), 0.1)
    >>> w[0, 0] = 12.7
    >>> q = IQ4_NL.qparams(w)
    >>> [round(value, 2) for value in (float(q.scale), *IQ4_NL.fake_quant(w, q)[0, :2].tolist())]
    [-0.1, 12.7, -0.1]
    >>> w = torch.tensor([[-0.5, -0.25, 0.0, 0.25]]).repeat(1, 16)
    >>> q = Q2_0.qparams(w)
    >>> float(q.scale), Q2_0.quantize(w, q).codes[0, :4].tolist(), Q2_0.fake_quant(w, q)[0, :4].tolist()
    (-0.25, [3, 2, 1, 0], [-0.5, -0.25, -0.0, 0.25])
    """

    label: str
    elements: Table = IQ4_NL_TABLE
    group: int = 32
    searched: tuple[float, ...] = ()
    scale_dtype: torch.dtype = torch.float16

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        """All of them."""
        return IQ4_NL, Q2_0

    @property
    def name(self) -> str:
        """``iq4_nl``."""
        return self.label

    @property
    def longest(self) -> float:
        """The element of the largest absolute value: -127, or 2."""
        return max(self.elements.values, key=abs)

    @property
    def scales(self) -> Plain:
        """One number of either sign a group."""
        return Plain(self.scale_dtype)

    @property
    def zero(self) -> Zero:
        """None: the table has its own middle."""
        return "none"

    @property
    def independent_ends(self) -> bool:
        """The longer side of the table covers the larger end."""
        return False

    @property
    def learns_range(self) -> bool:
        """Ranges are learned."""
        return True

    def bits_per_value(self, columns: int) -> float:
        """Codes and scales.

        >>> IQ4_NL.bits_per_value(64), Q2_0.bits_per_value(64)
        (4.5, 2.25)
        """
        return self.elements.bits + self.scales.bits * self.groups(columns) / columns

    def from_range(self, low: Tensor, high: Tensor, tensor_peak: Tensor | None = None) -> QParams:
        """Qparams of a range; the larger end decides, and the sign of the scale. ``tensor_peak`` has no effect."""
        size = self.scales.store(torch.maximum(high, -low) / abs(self.longest))
        scale = torch.where((high > -low) == (self.longest > 0), size, -size)
        return QParams(scale, torch.zeros_like(scale))

    def range_of(self, qparams: QParams) -> tuple[Tensor, Tensor]:
        """The inverse of ``from_range``: the shorter side ends where the table does."""
        first, last = qparams.scale * self.elements.values[0], qparams.scale * self.elements.values[-1]
        return torch.minimum(first, last), torch.maximum(first, last)

    def position(self, x: Tensor, qparams: QParams) -> Tensor:
        """``x / scale`` between codes; piecewise linear."""
        return self.elements.code(x / qparams.scale)

    def round(self, x: Tensor, qparams: QParams) -> Tensor:
        """The codes of the nearest elements."""
        return self.elements.code(self.elements.nearest(x / qparams.scale))

    def value(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``table[code] * scale``."""
        return self.elements.value(codes) * qparams.scale

    def nearest(self, x: Tensor, qparams: QParams) -> Tensor:
        """``value(round(x))`` without codes."""
        return self.elements.nearest(x / qparams.scale) * qparams.scale

    def fits_scale_dtype(self, qparams: QParams) -> bool:
        """Every scale is below the largest number of ``scale_dtype``."""
        return float(qparams.scale.abs().max()) < torch.finfo(self.scale_dtype).max

    def neighbours(self, qparams: QParams, tensor_peak: Tensor | None = None) -> list[QParams]:
        """Scales that map the group's largest value to ``searched``, of both signs."""
        top = qparams.scale.abs() * abs(self.longest)
        sizes = [self.scales.store(top / end) for end in self.searched]
        return [QParams(sign * size, qparams.zero) for size in sizes for sign in (-1.0, 1.0)]


IQ4_NL = TableFormat("iq4_nl", IQ4_NL_TABLE, 32, tuple(range(143, 110, -2)))
# From the largest value as a 1, which llama.cpp's own quantizer takes, to one beyond the table's end, which is cut.
Q2_0 = TableFormat("q2_0", Q2_0_TABLE, 64, tuple(1 + step / 8 for step in range(21)))
TABLES = {format.label: format for format in (IQ4_NL, Q2_0)}
