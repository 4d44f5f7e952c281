"""Activation formats: how the input of a linear is quantized, here with one dynamic range per token.

Ranges that are calibrated and stored are in ``static_activations.py``.

``IntTokens`` follows the arithmetic of ``compressed-tensors`` 0.20 for ``strategy: token, dynamic: true``, operation
for operation, so that a checkpoint gives the same logits in stock ``transformers`` as in the simulation: signed
codes, ``scale = (max - min) / (2**b - 1)`` with a range that includes 0 (symmetric: ``absmax / ((2**b - 1) / 2)``),
the zero point rounded once, and ``round(x / scale + zero)``. Another order would round ties differently, and the
simulated logits would differ from those of the runtime. The scale is not stored, so it keeps the compute dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant import inductor
from lowbit.quant.format import Factor, round_ste
from lowbit.quant.integer import MAX_BITS, MIN_BITS


class ActFormat(ABC):
    """How one tensor of activations is quantized."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in messages, such as ``a8-asym``."""

    @property
    @abstractmethod
    def independent_ends(self) -> bool:
        """Both ends of a range are independent: sign flips that move a token's outliers to one side narrow it."""

    @property
    @abstractmethod
    def clippable(self) -> bool:
        """``InputClip`` can clip its ranges and shift its codes."""

    def check_width(self, width: int) -> None:  # noqa: B027 (most formats take every width)
        """Raise ``LowbitError`` for a width that the format's groups do not divide."""

    @abstractmethod
    def fake_quant(self, x: Tensor) -> Tensor:
        """``x`` ``(..., width)`` quantized and dequantized, in its own dtype; differentiable."""


@dataclass(frozen=True)
class IntegerActs(ActFormat):
    """Integers: the arithmetic of a range, wherever it comes from.

    Attributes:
        bits: bits per code.
        symmetric: no zero point.
    """

    bits: int
    symmetric: bool
    most_bits: ClassVar[int] = MAX_BITS

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= self.most_bits:
            raise LowbitError(f"{self.bits} bits given; {MIN_BITS} to {self.most_bits} are allowed")

    @property
    def name(self) -> str:
        """``a8-asym``."""
        return f"a{self.bits}-{'sym' if self.symmetric else 'asym'}"

    @property
    def independent_ends(self) -> bool:
        """With a zero point a range need not be symmetric."""
        return not self.symmetric

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest signed code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def from_range(self, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of ranges, ``(..., 1)`` each; a symmetric format has no zero point."""
        eps = torch.finfo(bottom.dtype).eps
        if self.symmetric:
            scale = torch.maximum(bottom.abs(), top.abs()) / ((2**self.bits - 1) / 2)
            return torch.where(scale == 0, eps, scale), None
        scale = (top - bottom) / (2**self.bits - 1)
        # An all-zero vector has scale 0; any positive scale then gives zeros, and compressed-tensors uses eps.
        scale = torch.where(scale == 0, eps, scale)
        low_code, high_code = self.codes
        return scale, round_ste((low_code - bottom / scale).clamp(low_code, high_code))

    def on_range(self, x: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None = None) -> Tensor:
        """Activations rounded to the nearest values of the scale and zero point of ``from_range``.

        ``offset`` is added before rounding, in quantization steps, one per channel ``(width,)``.
        """
        low_code, high_code = self.codes
        steps = x / scale if offset is None else x / scale + offset
        if zero is None:
            return round_ste(steps.clamp(low_code, high_code)) * scale
        return (round_ste((steps + zero).clamp(low_code, high_code)) - zero) * scale


@dataclass(frozen=True)
class IntTokens(IntegerActs):
    """Integers of 2 to 8 bits with one range for each vector along the last axis: a token, or a token and head.

    >>> IntTokens(2, symmetric=False).fake_quant(torch.tensor([[0.0, 1.0, 2.0, 3.1]])).tolist()
    [[0.0, 1.0333333015441895, 2.066666603088379, 3.0999999046325684]]
    """

    @property
    def clippable(self) -> bool:
        """Ranges are computed here, so they can be clipped."""
        return True

    def fake_quant(self, x: Tensor, low: Factor = 1.0, high: Factor = 1.0, offset: Tensor | None = None) -> Tensor:
        """``x`` rounded to the nearest values of its tokens' ranges; straight-through gradients, also to the range.

        Args:
            x: ``(..., width)``.
            low, high: clipping ratios of the ends of every range; values beyond are clipped.
            offset: added before rounding, in quantization steps, one per channel ``(width,)``.

        No stock runtime supports clipping ratios or offsets.
        """
        if not inductor.active(x):
            bottom, top = token_ends(x)
            scale, zero = self.from_range(bottom * low, top * high)
            return self.on_range(x, scale, zero, offset)
        bottom, top = inductor.compiled(_token_ends, self)(x)
        scale, zero = self.from_range(bottom * low, top * high)
        return inductor.compiled(_on_range, self)(x, scale, zero, offset)


def token_ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of each token's range, 0 included, ``(..., 1)`` each; differentiable."""
    return x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)


def _token_ends(x: Tensor, format: IntTokens) -> tuple[Tensor, Tensor]:
    return token_ends(x)


def _on_range(x: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, format: IntTokens) -> Tensor:
    return format.on_range(x, scale, zero, offset)
