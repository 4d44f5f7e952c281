"""Rounding of inputs that is left out here and there while something is learned.

Source: QDrop, Wei et al., ICLR 2022, arXiv 2203.05740. A fit on a few sequences learns to answer for the very errors
that rounding makes on those. Where a random share of a linear's input stays float in each step, the errors differ
from step to step, and what is learned holds for other text as well. What is judged on held-out sequences, and what
ships, rounds everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError


def check_drop(step: str, share: float) -> None:
    """Refuse a share that is none.

    >>> check_drop("lowrank", 1.0)
    Traceback (most recent call last):
        ...
    lowbit.errors.LowbitError: lowrank.drop 1 given; a share from 0 to below 1 is allowed
    """
    if not 0 <= share < 1:
        raise LowbitError(f"{step}.drop {share:g} given; a share from 0 to below 1 is allowed")


class Drop:
    """What a linear sees while learning: each number of its input float with probability ``share``, else rounded.

    Args:
        share: from 0, which draws nothing, to below 1.
        device: where the inputs are.
        seed: of the draws; equal seeds and calls draw equal numbers on one device.

    Seed 0 draws 0.496, 0.768, 0.088, 0.132, 0.307, 0.634: at a share of 0.4 the third to the fifth stay float.

    >>> Drop(0.4, torch.device("cpu"), seed=0)(torch.full((6,), 0.25), torch.zeros(6)).tolist()
    [0.0, 0.0, 0.25, 0.25, 0.25, 0.0]
    """

    def __init__(self, share: float, device: torch.device | str, seed: int) -> None:
        self.share = share
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, x: Tensor, rounded: Tensor) -> Tensor:
        """``x`` with ``rounded`` in the place of most of it; without gradients, ``rounded``."""
        if not (self.share and torch.is_grad_enabled()):
            return rounded
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) < self.share
        return torch.where(kept, x, rounded)
