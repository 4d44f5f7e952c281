"""Floating-point formats: FP8, and the block formats NVFP4, MXFP4, MXFP6 and MXFP8.

``value = element * scale``. A format is an element type, the values that share a scale, and how that scale is stored:

=========== ======== ================= ==========================================
name        element  share a scale     scale
=========== ======== ================= ==========================================
``fp8``     E4M3     a row             bfloat16
``mxfp8``   E4M3     32 of a row       E8M0
``mxfp6``   E2M3     32 of a row       E8M0
``mxfp4``   E2M1     32 of a row       E8M0
``nvfp4``   E2M1     16 of a row       E4M3, over a power of two for the tensor
=========== ======== ================= ==========================================

``fp8-tensor`` and ``fp8-block`` are FP8 with one scale for the tensor, and for tiles of 128 x 128, of which those at
the right and lower edges may be smaller. Elements and scales are those of OCP Microscaling Formats v1.0 and of
compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import unknown
from lowbit.quant.elements import E2M1, E2M3, E4M3, Float
from lowbit.quant.format import Format, QParams, Zero
from lowbit.quant.scales import Plain, PowerOfTwo, TwoLevel, outer_exponent, shared_exponent

SEARCH = 10  # scales that a search tries where they are plain numbers


@dataclass(frozen=True)
class FloatFormat(Format):
    """Floating-point elements with a shared scale.

    Attributes:
        label: the name in schemes.
        elements: the element type.
        group: consecutive values of a row that share a scale; ``None``: the whole row.
        scales: how scales are stored.
        rows: consecutive rows that share a scale; 0: all.

    >>> w = torch.tensor([[0.6, -0.3, 0.1, 0.05, -0.9, 0.45, 0.2, -0.15, 0, 0.75, -0.6, 0.3, 0.12, -0.07, 0.5, -0.4]])
    >>> NVFP4.fake_quant(w, NVFP4.qparams(w))[0, :5].tolist()
    [0.625, -0.3125, 0.078125, 0.078125, -0.9375]
    """

    label: str
    elements: Float = E2M1
    group: int | None = None
    scales: Plain | PowerOfTwo | TwoLevel = Plain(torch.bfloat16)
    rows: int = 1

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        """All of them."""
        return tuple(FLOATS.values())

    @property
    def name(self) -> str:
        """``nvfp4``."""
        return self.label

    @property
    def zero(self) -> Zero:
        """Symmetric."""
        return "none"

    @property
    def independent_ends(self) -> bool:
        """Symmetric: the larger end decides."""
        return False

    @property
    def learns_range(self) -> bool:
        """Powers of two are searched, not learned."""
        return not isinstance(self.scales, PowerOfTwo)

    @property
    def smaller_last_group(self) -> bool:
        """Tiles at the right and lower edges may be smaller."""
        return self.rows > 1

    @property
    def in_blocks(self) -> bool:
        """MX and NVFP4: scales of a byte for blocks of a row."""
        return not isinstance(self.scales, Plain)

    @property
    def middle(self) -> int:
        """The code of 0."""
        return self.elements.middle

    def bits_per_value(self, columns: int) -> float:
        """Codes and scales; a scale that several rows share is not counted, nor one of a whole tensor.

        >>> NVFP4.bits_per_value(64), MXFP4.bits_per_value(64)
        (4.5, 4.25)
        """
        shared = self.scales.bits * self.groups(columns) / columns
        return self.elements.bits + (shared / self.rows if self.rows else 0.0)

    def from_range(self, low: Tensor, high: Tensor, tensor_peak: Tensor | None = None) -> QParams:
        """Qparams of a range; the larger end decides. See ``Format.from_range``."""
        peak = self._over_rows(torch.maximum(high, -low))
        if isinstance(self.scales, PowerOfTwo):
            scale = self.scales.rule(peak, self.elements)
        elif isinstance(self.scales, TwoLevel):
            whole = peak.detach().max() if tensor_peak is None else tensor_peak.to(peak.dtype)
            scale = self.scales.rule(peak, whole, self.elements.largest)
        else:
            scale = self.scales.store(peak / self.elements.largest)
        return self._with(scale)

    def range_of(self, qparams: QParams) -> tuple[Tensor, Tensor]:
        """The inverse of ``from_range``."""
        largest = (
            2.0**self.elements.largest_exponent if isinstance(self.scales, PowerOfTwo) else self.elements.largest
        )
        peak = qparams.scale * largest
        return -peak, peak

    def position(self, x: Tensor, qparams: QParams) -> Tensor:
        """``x / scale`` between codes; piecewise linear."""
        return self.elements.code(x / qparams.scale)

    def round(self, x: Tensor, qparams: QParams) -> Tensor:
        """The codes of the nearest elements, ties to even ones."""
        return self.elements.code(self.elements.nearest(x / qparams.scale))

    def value(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``element * scale``."""
        return self.elements.value(codes) * qparams.scale

    def nearest(self, x: Tensor, qparams: QParams) -> Tensor:
        """``value(round(x))`` without codes: their gradients are steps, which are 0 for the element 0."""
        return self.elements.nearest(x / qparams.scale) * qparams.scale

    def fits_scale_dtype(self, qparams: QParams) -> bool:
        """No scale is clamped to the largest that can be stored."""
        return not isinstance(self.scales, Plain) or bool(qparams.scale.max() < torch.finfo(self.scales.dtype).max)

    def neighbours(self, qparams: QParams, tensor_peak: Tensor | None = None) -> list[QParams]:
        """The next stored scales below and above."""
        scale = qparams.scale
        if isinstance(self.scales, PowerOfTwo):
            return [self._with(self.scales.moved(scale, factor)) for factor in (0.5, 2.0)]
        if isinstance(self.scales, TwoLevel):
            return [self._with(moved) for moved in self._scale_codes(scale, tensor_peak)]
        store = self.scales.store
        return [self._with(self._over_rows(store(scale * (1 - step / 20)))) for step in range(1, SEARCH)]

    def _scale_codes(self, scale: Tensor, tensor_peak: Tensor | None) -> list[Tensor]:
        """Scales whose E4M3 code is near: from 2 below to 7 above, where the largest value becomes a 4.

        On Gaussian weights the best of them lowers the mean square error from 0.0090 to 0.0066.
        """
        exponent = shared_exponent([scale]) or 0 if tensor_peak is None else int(outer_exponent(tensor_peak))
        outer = 2.0**exponent
        codes = E4M3.code(scale * outer)
        moved = ((codes + step).clamp(E4M3.middle + 1, 2 * E4M3.middle) for step in range(-2, 8) if step)
        return [E4M3.value(code) / outer for code in moved]

    def _with(self, scale: Tensor) -> QParams:
        return QParams(scale, torch.full_like(scale, self.middle))

    @property
    def shares_rows(self) -> bool:
        """In tiles, and with one scale for the tensor."""
        return self.rows != 1

    def over_shared_rows(self, per_group: Tensor) -> Tensor:
        """Sums over a tile, or over the tensor."""
        if self.rows == 1:
            return per_group
        parts = per_group.split(self.rows or len(per_group))
        return torch.cat([part.sum(0, keepdim=True).expand_as(part) for part in parts])

    def _over_rows(self, peak: Tensor) -> Tensor:
        """The largest of all rows that share a scale, for each row."""
        if self.rows == 1:
            return peak
        if self.rows == 0:
            return peak.amax(0, keepdim=True).expand_as(peak)
        tiles = [part.amax(0, keepdim=True).expand_as(part) for part in peak.split(self.rows)]
        return torch.cat(tiles)


NVFP4 = FloatFormat("nvfp4", E2M1, 16, TwoLevel())
MXFP4 = FloatFormat("mxfp4", E2M1, 32, PowerOfTwo())
MXFP6 = FloatFormat("mxfp6", E2M3, 32, PowerOfTwo())
MXFP8 = FloatFormat("mxfp8", E4M3, 32, PowerOfTwo())
FP8 = FloatFormat("fp8", E4M3, None, Plain(torch.bfloat16))
FP8_TENSOR = FloatFormat("fp8-tensor", E4M3, None, Plain(torch.bfloat16), rows=0)
FP8_BLOCK = FloatFormat("fp8-block", E4M3, 128, Plain(torch.bfloat16), rows=128)
FLOATS = {format.label: format for format in (NVFP4, MXFP4, MXFP6, MXFP8, FP8, FP8_TENSOR, FP8_BLOCK)}


def float_format(name: str) -> FloatFormat:
    """A floating-point format by its name."""
    if name not in FLOATS:
        raise unknown("floating-point format", name, FLOATS)
    return FLOATS[name]
