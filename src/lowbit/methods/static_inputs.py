"""Static inputs in a learned step: ranges that start where calibration puts them and are trained with the maps.

Maps change the inputs, so a range that is found behind them would not be the one that they were trained for. Here
the ranges are fixed before the first step, at the starting point, and where clipping is learned their ends move by
the ratios of ``LearnedRatio``, as those of weights do. The step leaves the trained ranges in the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lowbit.methods.clipping import LearnedRatio
from lowbit.methods.input_ranges import static_groups, with_input_ranges
from lowbit.models.block import Block, Calib
from lowbit.quant.format import QParams
from lowbit.quant.static_activations import StaticActs


@dataclass(frozen=True)
class LearnedRange:
    """The range of one input.

    Attributes:
        format: the input's.
        start: calibrated qparams.
        ratio: of the low and the high end, ``(2,)``; ``None``: the range stays.
    """

    format: StaticActs
    start: QParams
    ratio: LearnedRatio | None

    def qparams(self) -> QParams:
        """The qparams of the range as it is now; differentiable in the ratio."""
        if self.ratio is None:
            return self.start
        low, high = self.format.range_of(self.start)
        factor = self.ratio.value()
        return self.format.qparams(low * factor[:1], high * factor[1:])


@dataclass(frozen=True)
class LearnedInputs:
    """The ranges of a block's static inputs by linear; linears that share an input share one."""

    ranges: dict[str, LearnedRange]

    @classmethod
    def of(cls, block: Block, calib: Calib, learn: bool) -> Self:
        """Ranges of a block at the starting point of a fit, calibrated where it has none.

        Args:
            block: the block.
            calib: the hidden states before it.
            learn: learn the ratios of formats that pass gradients to the ends.
        """
        calibrated = with_input_ranges(block, calib).input_qparams
        ranges: dict[str, LearnedRange] = {}
        for group, format in static_groups(block):
            one = torch.ones(2, device=block.device)
            ratio = LearnedRatio.at(one) if learn and format.learns_range else None
            ranges |= dict.fromkeys(group, LearnedRange(format, calibrated[group[0]], ratio))
        return cls(ranges)

    def leaves(self) -> list[Tensor]:
        """The learned tensors, each once."""
        ratios = {id(own): own.ratio for own in self.ranges.values() if own.ratio is not None}
        return [ratio.logit for ratio in ratios.values()]

    def qparams(self) -> dict[str, QParams]:
        """Qparams by linear."""
        shared = {id(own): own.qparams() for own in self.ranges.values()}
        return {name: shared[id(own)] for name, own in self.ranges.items()}
