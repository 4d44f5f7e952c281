"""llama.cpp's K-quants: integers whose scales are integers themselves, times a float16 of 256 values.

========= ===== ========== ============== ============ ==================================
name      bits  share a    scale          minimum      value
                scale
========= ===== ========== ============== ============ ==================================
``q2_k``  2     16         4 bits         4 bits       ``d * sc * q - dmin * m``
``q3_k``  3     16         6 bits, signed              ``d * sc * (q - 4)``
``q4_k``  4     32         6 bits         6 bits       ``d * sc * q - dmin * m``
``q5_k``  5     32         6 bits         6 bits       ``d * sc * q - dmin * m``
``q6_k``  6     16         8 bits, signed              ``d * sc * (q - 32)``
========= ===== ========== ============== ============ ==================================

``d`` and ``dmin`` are float16, one each for a superblock of 256. Products of ``d`` and ``sc`` are exact in float32,
so qparams hold the effective scale and minimum of each group, and ``split_scales`` finds integers and ``d`` again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.elements import Int, given
from lowbit.quant.format import Format, QParams, Zero, round_ste, split_groups
from lowbit.quant.scales import Integers, split_scales, stored_scale

SUPERBLOCK = 256


@dataclass(frozen=True)
class KQuant(Format):
    """A K-quant.

    Attributes:
        label: the name in schemes.
        bits: of a code.
        group: values that share a scale.
        scales: how scales are stored; minima likewise.
        has_minimum: whether groups have a minimum of their own; otherwise they are symmetric.

    >>> format = k_quant("q4_k")
    >>> w = torch.linspace(-1, 1, 256)[None]
    >>> q = format.qparams(w)
    >>> float((format.fake_quant(w, q) - w).abs().max()) < 0.04
    True
    """

    label: str
    bits: int = 4
    group: int = 32
    scales: Integers = Integers(6, 63)
    has_minimum: bool = True

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        """All of them."""
        return tuple(K_QUANTS.values())

    @property
    def name(self) -> str:
        """``q4_k``."""
        return self.label

    @property
    def elements(self) -> Int:
        """Integers."""
        return Int(self.bits)

    @property
    def zero(self) -> Zero:
        """The groups' own minimum, or none."""
        return "offset" if self.has_minimum else "none"

    @property
    def independent_ends(self) -> bool:
        """With a minimum a range need not be symmetric."""
        return self.has_minimum

    @property
    def learns_range(self) -> bool:
        """Ranges are learned; rounding their scales to integers passes gradients."""
        return True

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of 0 of a format without minimum."""
        return 2 ** (self.bits - 1)

    @property
    def width_unit(self) -> int:
        """The superblock."""
        return SUPERBLOCK

    def groups(self, columns: int) -> int:
        """Number of groups; raises ``LowbitError`` for a width that superblocks do not divide."""
        if columns % SUPERBLOCK:
            raise LowbitError(
                f"{self.label} has blocks of {SUPERBLOCK}, which do not divide a width of {columns}: give this "
                "module another format, such as w4g32 or iq4_nl"
            )
        return columns // self.group

    def bits_per_value(self, columns: int) -> float:
        """Codes, the groups' integers, and the superblocks' float16.

        >>> [k_quant(name).bits_per_value(256) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")]
        [2.625, 3.4375, 4.5, 5.5, 6.5625]
        """
        both = 2 if self.has_minimum else 1
        return self.bits + both * (self.scales.bits / self.group + 16 / SUPERBLOCK)

    def from_range(self, low: Tensor, high: Tensor, tensor_peak: Tensor | None = None) -> QParams:
        """Qparams of a range; see ``Format.from_range``. ``tensor_peak`` has no effect."""
        if not self.has_minimum:
            scale = self._products(torch.maximum(high, -low) / (self.levels / 2), least=1)
            return QParams(scale, torch.full_like(scale, self.middle))
        return QParams(self._products((high - low) / self.levels, least=1), self._products(-low, least=0))

    def range_of(self, qparams: QParams) -> tuple[Tensor, Tensor]:
        """The inverse of ``from_range``."""
        if not self.has_minimum:
            half = qparams.scale * (self.levels / 2)
            return -half, half
        return -qparams.zero, qparams.scale * self.levels - qparams.zero

    def position(self, x: Tensor, qparams: QParams) -> Tensor:
        """``(x + minimum) / scale``, or ``x / scale`` from the middle."""
        return (x + qparams.zero) / qparams.scale if self.has_minimum else x / qparams.scale + qparams.zero

    def round(self, x: Tensor, qparams: QParams) -> Tensor:
        """The nearest codes."""
        if self.has_minimum:
            return round_ste((x + qparams.zero) / qparams.scale).clamp(0, self.levels)
        return (round_ste(x / qparams.scale) + qparams.zero).clamp(0, self.levels)

    def value(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``scale * code - minimum``, or ``scale * (code - middle)``."""
        if self.has_minimum:
            return qparams.scale * codes - qparams.zero
        return qparams.scale * (codes - qparams.zero)

    def fits_scale_dtype(self, qparams: QParams) -> bool:
        """No superblock's factor is clamped to the largest float16."""
        top = max(float(qparams.scale.max()), float(qparams.zero.max()) if self.has_minimum else 0.0)
        return top < self.scales.largest * torch.finfo(torch.float16).max

    def neighbours(self, qparams: QParams, tensor_peak: Tensor | None = None) -> list[QParams]:
        """The next integers for each group's scale and minimum, with the same factors of superblocks."""
        scales = self._moved(qparams.scale, range(-2, 3), least=1)
        if not self.has_minimum:
            return [QParams(scale, qparams.zero) for scale in scales]
        minima = self._moved(qparams.zero, range(-2, 3), least=0)
        return [QParams(scale, minimum) for scale in scales for minimum in minima]

    def _products(self, wanted: Tensor, least: int) -> Tensor:
        """The nearest products of an integer and a float16 of a superblock, ``(rows, groups)``."""
        blocks = split_groups(wanted, self._superblocks(wanted))
        factor = stored_scale(blocks.detach().amax(-1, keepdim=True) / self.scales.largest, torch.float16)
        products = (blocks.detach() / factor).round().clamp(least, self.scales.largest) * factor
        return given(blocks, products).flatten(-2)

    def _moved(self, stored: Tensor, steps: range, least: int) -> list[Tensor]:
        factor, integers, _ = split_scales(split_groups(stored, self._superblocks(stored)), self.scales)
        moved = ((integers + step).clamp(least, self.scales.largest) * factor for step in steps)
        return [value.flatten(-2).to(stored.dtype) for value in moved]

    def _superblocks(self, per_group: Tensor) -> int:
        return per_group.shape[-1] * self.group // SUPERBLOCK


def _k(label: str, bits: int, group: int, scale_bits: int, largest: int, has_minimum: bool) -> KQuant:
    return KQuant(label, bits, group, Integers(scale_bits, largest, signed=not has_minimum), has_minimum)


K_QUANTS = {
    format.label: format
    for format in (
        _k("q2_k", 2, 16, 4, 15, True),
        _k("q3_k", 3, 16, 6, 31, False),
        _k("q4_k", 4, 32, 6, 63, True),
        _k("q5_k", 5, 32, 6, 63, True),
        _k("q6_k", 6, 16, 8, 127, False),
    )
}


def k_quant(name: str) -> KQuant:
    """A K-quant by its name."""
    return K_QUANTS[name]
