"""Floating-point activations, quantized dynamically: FP8 per token or group, MXFP8, MXFP6 and MXFP4.

The arithmetic is that of ``compressed-tensors`` 0.20, operation for operation, in the dtype of the activations:
``scale = absmax / largest``, or the power of two of ``PowerOfTwo.rule``; ``element(x / scale) * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.activations import ActFormat
from lowbit.quant.elements import E2M1, E2M3, E4M3, Float
from lowbit.quant.scales import PowerOfTwo


@dataclass(frozen=True)
class FloatActs(ActFormat):
    """Floating-point elements with a scale for each token, or for each group of a token's values.

    Attributes:
        label: the name in schemes and messages.
        element: the element type.
        group: consecutive values that share a scale; ``None``: all of a token.
        powers: scales are powers of two.

    >>> FP8_TOKENS.fake_quant(torch.tensor([[448.0, 17.0, 0.3]])).tolist()
    [[448.0, 16.0, 0.3125]]
    """

    label: str
    element: Float
    group: int | None = None
    powers: bool = False

    @property
    def name(self) -> str:
        """``fp8`` or ``mxfp4``."""
        return self.label

    @property
    def independent_ends(self) -> bool:
        """Symmetric: the larger end decides."""
        return False

    @property
    def clippable(self) -> bool:
        """No runtime clips these ranges."""
        return False

    def check_width(self, width: int) -> None:
        """Refuse a width that groups do not divide."""
        if self.group is not None and width % self.group:
            raise LowbitError(
                f"inputs in {self.label} have groups of {self.group}, which do not divide a width of {width}: choose "
                "another scheme, or leave this module in float"
            )

    def fake_quant(self, x: Tensor) -> Tensor:
        """``x`` ``(..., width)`` quantized and dequantized; straight-through gradients, also to plain scales."""
        grouped = x[..., None, :] if self.group is None else x.unflatten(-1, (-1, self.group))
        peak = grouped.abs().amax(-1, keepdim=True)
        if self.powers:
            scale = PowerOfTwo().rule(peak, self.element)
        else:
            scale = peak / self.element.largest
            scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        return (self.element.nearest(grouped / scale) * scale).flatten(-2)


FP8_TOKENS = FloatActs("fp8", E4M3)
FP8_GROUPS = FloatActs("fp8-group", E4M3, 128)
MXFP8_ACTS, MXFP6_ACTS, MXFP4_ACTS = (
    FloatActs(name, element, 32, True) for name, element in (("mxfp8", E4M3), ("mxfp6", E2M3), ("mxfp4", E2M1))
)
FLOAT_ACTS = {acts.label: acts for acts in (FP8_TOKENS, FP8_GROUPS, MXFP8_ACTS, MXFP6_ACTS, MXFP4_ACTS)}
