"""Learned clipping ratios of weight ranges, which start exactly where the block is.

OmniQuant (Shao et al., ICLR 2024, arXiv 2308.13137, section 3.2) clips a range to ``sigmoid(u)`` of it and starts at
``u = 4``, 0.982 of the range. After a step that chose ratios, or with none chosen, that start would change the codes
before anything is learned. Here the ratio is ``sigmoid(u) + c`` with a constant ``c`` that makes the start the given
one: the slope of the sigmoid, and no change without training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lowbit.models.block import Block

START = 4.0  # sigmoid(4) = 0.982: closer to 1 the sigmoid has hardly a slope
LEAST = -7.0  # sigmoid(-7) = 0.001: the same at the other end


@dataclass(frozen=True)
class LearnedRatio:
    """``sigmoid(logit) + offset``, at least 0.

    Attributes:
        logit: the learned tensor.
        offset: constant of the same shape; 0 where the ratio starts at ``sigmoid(START)``.
    """

    logit: Tensor
    offset: Tensor

    @classmethod
    def at(cls, ratio: Tensor) -> Self:
        """The ratio that starts at ``ratio``, bit for bit where it is from 0.001 to 1.

        >>> LearnedRatio.at(torch.tensor([1.0, 0.75])).value().tolist()
        [1.0, 0.75]
        """
        logit = ratio.clamp(0, 1).logit().clamp(LEAST, START)
        # From half to twice the sigmoid the difference is exact, and so is its sum with the sigmoid.
        return cls(logit.requires_grad_(), ratio - logit.detach().sigmoid())

    @classmethod
    def papers(cls, shape: tuple[int, ...], device: torch.device) -> Self:
        """OmniQuant's: ``sigmoid(logit)``, from 0.982."""
        logit = torch.full(shape, START, device=device)
        return cls(logit.requires_grad_(), torch.zeros_like(logit))

    def value(self) -> Tensor:
        """The ratio; differentiable in the logit."""
        return (self.logit.sigmoid() + self.offset).clamp(min=0)


@dataclass(frozen=True)
class LearnedClips:
    """Learned ratios of the lower and upper ends of a weight's ranges, ``(rows, groups)`` each."""

    low: LearnedRatio
    high: LearnedRatio

    @classmethod
    def of(cls, block: Block, linear: str, papers: bool = False) -> Self:
        """Ratios for a linear's groups that start at those of the block, 1 without any, or at the papers' 0.982."""
        weight = block.weight(linear)
        shape = (weight.shape[0], block.weight_format(linear).groups(weight.shape[1]))
        if papers:
            return cls(*(LearnedRatio.papers(shape, weight.device) for _ in range(2)))
        one = torch.ones((), device=weight.device)
        current = block.clips.get(linear, (one, one))
        return cls(*(LearnedRatio.at(clip.to(weight).expand(shape).clone()) for clip in current))

    def leaves(self) -> list[Tensor]:
        """The learned tensors."""
        return [self.low.logit, self.high.logit]

    def values(self) -> tuple[Tensor, Tensor]:
        """The ratios ``(low, high)``; differentiable."""
        return self.low.value(), self.high.value()
