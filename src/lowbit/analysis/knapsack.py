"""The multiple-choice knapsack: one option of each group, of least total loss within a bound on total cost.

Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11; dynamic programming over the cost above the
cheapest options, in units of the common divisor of all differences. One table has the solution for every bound, so
the same pass answers the opposite question, the least cost at which a loss is reached.

Rejected: greedy by gain per cost, which can leave part of the bound unused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNITS = 1 << 17  # most steps of a bound; with a finer unit, costs are rounded up to a step


@dataclass(frozen=True)
class Knapsack:
    """The solutions for every bound up to one; see ``solve``.

    Attributes:
        unit: cost of a step.
        steps: by group, the steps of each option above the cheapest.
        losses: least loss by steps.
        choices: by group, the option at each number of steps.
    """

    unit: int
    steps: tuple[tuple[int, ...], ...]
    losses: npt.NDArray[np.float64]
    choices: tuple[npt.NDArray[np.int16], ...]

    def picks(self, step: int = -1) -> list[int] | None:
        """One option of each group, by position, with that many steps or, by default, all; ``None``: none fits."""
        left = range(len(self.losses))[step]
        if not math.isfinite(self.losses[left]):
            return None
        out = []
        for steps, choice in zip(reversed(self.steps), reversed(self.choices), strict=True):
            out.append(int(choice[left]))
            left -= steps[out[-1]]
        return out[::-1]

    def first_within(self, loss: float) -> int | None:
        """The fewest steps whose least loss is at most ``loss``; ``None``: no bound so far is enough."""
        within = np.flatnonzero(self.losses <= loss)
        return int(within[0]) if len(within) else None


def solve(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], room: int) -> Knapsack | None:
    """All solutions within a total cost of ``room``; ``None`` where the cheapest options exceed it.

    Exact while the costs' differences, over their common divisor, fit into ``UNITS`` steps; beyond that costs are
    rounded up, so that the result fits but may be slightly worse than the optimum.

    >>> table = solve([[1, 2], [1, 3]], [[5.0, 1.0], [9.0, 2.0]], 5)
    >>> table.losses.tolist(), table.picks(), table.picks(table.first_within(7.0))
    ([14.0, 10.0, 7.0, 3.0], [1, 1], [0, 1])
    """
    spare = room - sum(map(min, costs))
    if spare < 0:
        return None
    extra = [[cost - min(group) for cost in group] for group in costs]
    spare = min(spare, sum(map(max, extra)))
    unit = max(math.gcd(*(cost for group in extra for cost in group)), 1)
    unit = max(unit, -(-spare // UNITS))
    count = spare // unit
    best = np.zeros(count + 1)  # least loss by steps available, over the groups so far
    choices, steps = [], [tuple(-(-cost // unit) for cost in group) for group in extra]
    for group, loss in zip(steps, losses, strict=True):
        options = np.full((len(group), count + 1), math.inf)
        for index, shift in enumerate(group):
            if shift <= count:
                options[index, shift:] = best[: count + 1 - shift] + loss[index]
        choices.append(options.argmin(0).astype(np.int16))
        best = options.min(0)
    return Knapsack(unit, tuple(steps), best, tuple(choices))


def least_loss(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], room: int) -> list[int] | None:
    """One choice from each group, by position, of least total loss within a cost of ``room``; ``None``: none fits.

    >>> least_loss([[1, 2], [1, 3]], [[5.0, 1.0], [9.0, 2.0]], 4)
    [0, 1]
    """
    table = solve(costs, losses, room)
    return None if table is None else table.picks()
