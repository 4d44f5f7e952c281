"""Ratios of ranges that are learned along with the codes, and what qparams follow from them.

Offsets follow the grid when it moves, so both ends of a range are free (``ends``). A gate or a choice is between
fixed codes: there the scale alone moves, by one ratio for both ends, and the zero point stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lowbit.models.block import Block
from lowbit.quant.format import Format, QParams

LEAST = 0.1  # of the range at the start


@dataclass(frozen=True)
class LearnedScales:
    """The qparams of one weight.

    Attributes:
        format: of the weight.
        start: the given qparams, ``(rows, groups)`` each.
        low, high: ends of the ranges that give them, the same.
        most: the largest ratio of each end, the same: a range that was clipped may grow to the weight's own.
        ratios: leaves, the same: one for both ends or one for each; none where scales are not learned.
        peak: as for ``Format.from_range``.
    """

    format: Format
    start: QParams
    low: Tensor
    high: Tensor
    most: tuple[Tensor, Tensor]
    ratios: tuple[Tensor, ...]
    peak: Tensor | None

    @classmethod
    def of(cls, block: Block, linear: str, start: QParams, learn: bool, ends: bool) -> Self:
        """Ratios of 1 for a linear of a block.

        Args:
            block: the block, with the clipping ratios that gave ``start``.
            linear: the name.
            start: its qparams.
            learn: whether the ratios are learned where the format has gradients for them.
            ends: one ratio for each end, where the format's ends are independent.
        """
        format, (low, high) = block.weight_format(linear), format_ends(block, linear)
        clips = [torch.as_tensor(clip, device=low.device) for clip in block.clips.get(linear, (1.0, 1.0))]
        most = tuple((1 / clip.clamp(min=LEAST)).clamp(min=1).expand_as(low) for clip in clips)
        own = ends and format.independent_ends
        if not own:
            low, high = format.range_of(start)
        count = (2 if own else 1) if learn and format.learns_range else 0
        ratios = tuple(torch.ones_like(low).requires_grad_() for _ in range(count))
        return cls(format, start, low, high, (most[0], most[1]), ratios, block.tensor_peak(linear))

    def qparams(self) -> QParams:
        """The qparams of the ranges as they are; differentiable in the ratios."""
        if not self.ratios:
            return self.start
        return self.format.from_range(self.low * self.ratios[0], self.high * self.ratios[-1], self.peak)

    def project(self) -> None:
        """After each step, without gradients: keep the ratios within their bounds."""
        mosts = self.most if len(self.ratios) == 2 else (torch.minimum(*self.most),)
        for ratio, most in zip(self.ratios, mosts[: len(self.ratios)], strict=True):
            ratio.clamp_(min=LEAST)
            torch.minimum(ratio, most, out=ratio)


def format_ends(block: Block, linear: str) -> tuple[Tensor, Tensor]:
    """The ends of each group's range as the block's clipping ratios leave them, ``(rows, groups)`` each."""
    low, high = block.clips.get(linear, (1.0, 1.0))
    bottom, top = block.weight_format(linear).ends(block.weight(linear))
    return bottom * low, top * high
