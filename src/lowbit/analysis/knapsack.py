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

UNITS = 1 << 17  # most steps of a bound; with a coarser unit than the divisor, costs are rounded up to a step


@dataclass(frozen=True)
class Knapsack:
    """The solutions for every bound up to one; see ``solve``.

    Attributes:
        unit: cost of a step.
        steps: by group, the steps of each option above the cheapest.
        losses: least loss by steps.
        choices: by group, the option at each number of steps.
        costs, table: true costs and losses of the options.
        room: the bound.
    """

    unit: int
    steps: tuple[tuple[int, ...], ...]
    losses: npt.NDArray[np.float64]
    choices: tuple[npt.NDArray[np.int16], ...]
    costs: Sequence[Sequence[int]]
    table: Sequence[Sequence[float]]
    room: int

    def best(self) -> list[int] | None:
        """One option of each group, of least loss within the bound; what rounding left unused is used too."""
        picks = self.picks()
        return None if picks is None else _improved(self.table, self.costs, picks, self.room)

    def cheapest(self, loss: float) -> list[int] | None:
        """One option of each group, of least cost with at most ``loss``; ``None``: nothing has so little."""
        step = self.first_within(loss)
        picks = None if step is None else self.picks(step)
        return None if picks is None else _improved(self.costs, self.table, picks, loss)

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
    rounded up, so that the result fits but may be slightly worse than the optimum. A bound that holds the largest
    options has as many steps as these have when rounded, so that all options are within it.

    >>> table = solve([[1, 2], [1, 3]], [[5.0, 1.0], [9.0, 2.0]], 5)
    >>> table.losses.tolist(), table.best(), table.cheapest(7.0)
    ([14.0, 10.0, 7.0, 3.0], [1, 1], [0, 1])
    """
    spare = room - sum(map(min, costs))
    if spare < 0:
        return None
    extra = [[cost - min(group) for cost in group] for group in costs]
    most = sum(map(max, extra))
    unit = max(math.gcd(*(cost for group in extra for cost in group)), 1)
    unit = max(unit, -(-min(spare, most) // UNITS))
    choices, steps = [], [tuple(-(-cost // unit) for cost in group) for group in extra]
    count = sum(map(max, steps)) if spare >= most else spare // unit
    best = np.zeros(count + 1)  # least loss by steps available, over the groups so far
    for group, loss in zip(steps, losses, strict=True):
        options = np.full((len(group), count + 1), math.inf)
        for index, shift in enumerate(group):
            if shift <= count:
                options[index, shift:] = best[: count + 1 - shift] + loss[index]
        choices.append(options.argmin(0).astype(np.int16))
        best = options.min(0)
    return Knapsack(unit, tuple(steps), best, tuple(choices), costs, losses, room)


def _improved(
    wanted: Sequence[Sequence[float]], bounded: Sequence[Sequence[float]], picks: Sequence[int], most: float
) -> list[int]:
    """``picks`` with options of one group after the other changed where that lowers what is wanted, best first.

    Args:
        wanted: by group and option, what is to be small.
        bounded: the same of what may be at most ``most`` in sum, as it is for ``picks``.
        picks: one option of each group.
        most: the bound.

    Of 16, options of cost 11 leave 5, which the first group's second option takes:

    >>> _improved([[3.0, 2.0], [3.0, 2.0], [9.0, 1.0]], [[0, 5], [0, 7], [0, 11]], [0, 0, 1], 16)
    [1, 0, 1]
    """
    out = list(picks)
    while True:
        left = most - sum(group[at] for group, at in zip(bounded, out, strict=True))
        changes = (
            (wanted[group][at] - gain, group, option)
            for group, at in enumerate(out)
            for option, gain in enumerate(wanted[group])
            if gain < wanted[group][at] and bounded[group][option] - bounded[group][at] <= left
        )
        if (change := max(changes, default=None)) is None:
            return out
        out[change[1]] = change[2]


def least_loss(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], room: int) -> list[int] | None:
    """One choice from each group, by position, of least total loss within a cost of ``room``; ``None``: none fits.

    >>> least_loss([[1, 2], [1, 3]], [[5.0, 1.0], [9.0, 2.0]], 4)
    [0, 1]
    """
    table = solve(costs, losses, room)
    return None if table is None else table.best()
