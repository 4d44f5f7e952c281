"""Formats of activations: quantized on the fly, with a range for each token, and never stored.

``IntTokens`` follows the arithmetic of ``compressed-tensors`` 0.20 for ``strategy: token, dynamic: true``, operation
for operation, so that a checkpoint gives the same logits in stock ``transformers`` as in the simulation: signed
codes, ``scale = (max - min) / (2**b - 1)`` with a range that includes 0 (symmetric: ``absmax / ((2**b - 1) / 2)``),
the zero rounded once, and ``round(x / scale + zero)``. Another order would round ties differently, and then logits
would differ from what runs. The scale is not stored anywhere, so it keeps the compute dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

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
        """As messages write it, such as ``a8-asym``."""

    @property
    @abstractmethod
    def independent_ends(self) -> bool:
        """Both ends of a range are free: sign flips that move a token's outliers to one side narrow it."""

    @property
    @abstractmethod
    def clippable(self) -> bool:
        """``InputClip`` can shrink its ranges and shift its codes."""

    @abstractmethod
    def fake_quant(self, x: Tensor) -> Tensor:
        """``x`` ``(..., width)`` as it is after quantization, in its own dtype; differentiable."""


@dataclass(frozen=True)
class IntTokens(ActFormat):
    """Integers with one range for each vector along the last axis: a token, or a token and head.

    Attributes:
        bits: width of a code, 2 to 8.
        symmetric: no zero point.

    >>> IntTokens(2, symmetric=False).fake_quant(torch.tensor([[0.0, 1.0, 2.0, 3.1]])).tolist()
    [[0.0, 1.0333333015441895, 2.066666603088379, 3.0999999046325684]]
    """

    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise LowbitError(f"{self.bits} bits given; {MIN_BITS} to {MAX_BITS} are allowed")

    @property
    def name(self) -> str:
        """``a8-asym``."""
        return f"a{self.bits}-{'sym' if self.symmetric else 'asym'}"

    @property
    def independent_ends(self) -> bool:
        """With a zero point a range need not be symmetric."""
        return not self.symmetric

    @property
    def clippable(self) -> bool:
        """Its ranges are found here, so they can be changed here."""
        return True

    @property
    def _codes(self) -> tuple[int, int]:
        """The least and the largest signed code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def fake_quant(self, x: Tensor, low: Factor = 1.0, high: Factor = 1.0, offset: Tensor | None = None) -> Tensor:
        """``x`` at the nearest values of its tokens' ranges; gradients pass straight through and reach the range.

        Args:
            x: ``(..., width)``.
            low, high: clipping ratios on the ends of every range; what lies beyond is clipped.
            offset: added before rounding, in steps, one for each channel ``(width,)``.

        No stock runtime clips or shifts.
        """
        if not inductor.active(x):
            bottom, top = token_ends(x)
            scale, zero = self.from_range(bottom * low, top * high)
            return self.on_range(x, scale, zero, offset)
        bottom, top = inductor.compiled(_token_ends, self)(x)
        scale, zero = self.from_range(bottom * low, top * high)
        return inductor.compiled(_on_range, self)(x, scale, zero, offset)

    def from_range(self, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of ranges, ``(..., 1)`` each; a symmetric format has no zero."""
        eps = torch.finfo(bottom.dtype).eps
        if self.symmetric:
            scale = torch.maximum(bottom.abs(), top.abs()) / ((2**self.bits - 1) / 2)
            return torch.where(scale == 0, eps, scale), None
        scale = (top - bottom) / (2**self.bits - 1)
        # An all-zero vector has scale 0; any positive scale then gives zeros, and eps is what the library takes.
        scale = torch.where(scale == 0, eps, scale)
        least, most = self._codes
        return scale, round_ste((least - bottom / scale).clamp(least, most))

    def on_range(self, x: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None) -> Tensor:
        """Activations at the nearest values of the ranges of ``from_range``."""
        least, most = self._codes
        steps = x / scale if offset is None else x / scale + offset
        if zero is None:
            return round_ste(steps.clamp(least, most)) * scale
        return (round_ste((steps + zero).clamp(least, most)) - zero) * scale


def token_ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of each token's range, 0 included, ``(..., 1)`` each; differentiable."""
    return x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)


def _token_ends(x: Tensor, format: IntTokens) -> tuple[Tensor, Tensor]:
    return token_ends(x)


def _on_range(x: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, format: IntTokens) -> Tensor:
    return format.on_range(x, scale, zero, offset)
