"""Formats that the package does not have: whoever does not know them must refuse them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.activations import ActFormat
from lowbit.quant.elements import Int
from lowbit.quant.format import Format, QParams, Zero, round_ste
from lowbit.quant.scales import Plain, stored_scale


@dataclass(frozen=True)
class Ternary(Format):
    """Rows of -s, 0 and s: codes 0, 1 and 2."""

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        return (cls(),)

    @property
    def name(self) -> str:
        return "ternary"

    @property
    def elements(self) -> Int:
        return Int(2)

    @property
    def group(self) -> int | None:
        return None

    @property
    def scales(self) -> Plain:
        return Plain(torch.float16)

    @property
    def zero(self) -> Zero:
        return "none"

    @property
    def independent_ends(self) -> bool:
        return False

    @property
    def learns_range(self) -> bool:
        return True

    def bits_per_value(self, columns: int) -> float:
        return 2 + 16 / columns

    def neighbours(self, qparams: QParams, tensor_peak: Tensor | None = None) -> list[QParams]:
        return [QParams(stored_scale(qparams.scale * 0.8, torch.float16), qparams.zero)]

    def from_range(self, low: Tensor, high: Tensor, tensor_peak: Tensor | None = None) -> QParams:
        scale = stored_scale(torch.maximum(high, -low), torch.float16)
        return QParams(scale, torch.ones_like(scale))

    def range_of(self, qparams: QParams) -> tuple[Tensor, Tensor]:
        return -qparams.scale, qparams.scale

    def position(self, x: Tensor, qparams: QParams) -> Tensor:
        return x / qparams.scale + 1

    def round(self, x: Tensor, qparams: QParams) -> Tensor:
        return (round_ste(x / qparams.scale) + 1).clamp(0, 2)

    def value(self, codes: Tensor, qparams: QParams) -> Tensor:
        return (codes - 1) * qparams.scale

    def fits_scale_dtype(self, qparams: QParams) -> bool:
        return float(qparams.scale.max()) < torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Halves(ActFormat):
    """Activations in float16."""

    @property
    def name(self) -> str:
        return "halves"

    @property
    def independent_ends(self) -> bool:
        return False

    @property
    def clippable(self) -> bool:
        return False

    def fake_quant(self, x: Tensor) -> Tensor:
        return x.half().to(x.dtype)
