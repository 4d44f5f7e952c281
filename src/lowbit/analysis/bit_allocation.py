"""Which linears should get more bits, and which can do with fewer: the least sensitivity within a number of bits.

Linears that read one tensor (q, k and v; gate and up) are one choice, since runtimes fuse them and then want one
format. For each such group and width the sensitivity is that of the group alone at that width; their sum is minimised
subject to the stored bits, codes with scales and zeros. That is a knapsack with one choice from each group (multiple
choice; Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11), solved exactly by dynamic programming
over the bits in units of their greatest common divisor.

Rejected: greedy by gain per bit, which can leave a gap that the next choice does not fit into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lowbit.errors import LowbitError
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme import Scheme

UNITS = 1 << 16  # steps of the budget at most; where its own unit is finer, costs are rounded up to this


@dataclass(frozen=True)
class Linear:
    """A rounded linear, and what it layer_sensitivity alone.

    Attributes:
        name: its full name.
        block: its layer's index.
        shape: ``(out, in)``.
        spec: its format.
        sensitivity: at that format.
        input: the part of the sensitivity that its rounded input makes, which no wider weight mends.
        rtn: by bits, its own output's relative error when rounded to nearest, the spec's bits included.
    """

    name: str
    block: int
    shape: tuple[int, int]
    spec: IntFormat
    sensitivity: float
    input: float
    rtn: dict[int, float]

    def sensitivity_at(self, bits: int) -> float:
        """The sensitivity at another width: the weight's part of it grows and shrinks as the error of rounding does.

        >>> one = Linear("q", 0, (2, 2), IntFormat(4), 0.5, 0.1, {4: 0.02, 8: 0.0001})
        >>> one.sensitivity_at(4), round(one.sensitivity_at(8), 6)
        (0.5, 0.102)
        """
        if bits == self.spec.bits:
            return self.sensitivity
        now, then = self.rtn[self.spec.bits], self.rtn[bits]
        if now == 0:  # held exactly as it is: wider stays so, and how bad narrower is cannot be told from here
            return self.sensitivity if then == 0 else math.inf
        part = max(self.sensitivity - self.input, 0.0)
        return self.sensitivity - part + part * then / now

    def bits_at(self, spec: IntFormat) -> int:
        """Bits that the weight takes in a format: codes, scales and zeros."""
        return round(self.shape[0] * self.shape[1] * spec.bits_per_value(self.shape[1]))


def fused(linears: Sequence[Linear], groups: Sequence[tuple[str, ...]]) -> list[list[Linear]]:
    """The linears in groups that share an input; names in ``groups`` are relative to a layer."""
    found: dict[tuple[int, int], list[Linear]] = {}
    for one in linears:
        at = next(i for i, group in enumerate(groups) if one.name.endswith(tuple(f".{name}" for name in group)))
        found.setdefault((one.block, at), []).append(one)
    return [found[key] for key in sorted(found)]


def formats(group: Sequence[Linear], base: IntFormat, bits: Sequence[int]) -> list[IntFormat]:
    """One format for all of a group at each width; where their formats differ by more, the scheme's own is taken."""
    shared = {replace(one.spec, bits=base.bits) for one in group}
    like = shared.pop() if len(shared) == 1 else base
    return [replace(like, bits=b) for b in bits]


def within_budget(
    groups: Sequence[Sequence[Linear]], base: IntFormat, bits: Sequence[int], room: int
) -> list[IntFormat]:
    """The format of each group that layer_sensitivity least while all together take ``room`` bits at most.

    Raises ``LowbitError`` where even the smallest widths take more.
    """
    choices = [formats(group, base, bits) for group in groups]
    costs = [
        [sum(one.bits_at(spec) for one in group) for spec in specs]
        for group, specs in zip(groups, choices, strict=True)
    ]
    losses = [[sum(one.sensitivity_at(b) for one in group) for b in bits] for group in groups]
    weights = sum(one.shape[0] * one.shape[1] for group in groups for one in group)
    picked = least_loss(costs, losses, room)
    if picked is None:
        least = sum(map(min, costs)) / weights
        raise LowbitError(
            f"the budget leaves {room / weights:.3f} bits for a weight of the blocks; with widths "
            f"{', '.join(map(str, bits))} and no linear made coarser that is exact now, at least {least:.3f} are "
            "needed: raise --budget or give smaller --bits"
        )
    return [specs[at] for specs, at in zip(choices, picked, strict=True)]


def least_loss(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], room: int) -> list[int] | None:
    """One choice from each group, by position, of least total loss and at most ``room`` cost; ``None``: none fits.

    Exact while the costs' differences, over their common divisor, fit into ``UNITS`` steps; beyond it costs are
    rounded up, so that the result fits but may miss the best by a little.

    >>> least_loss([[1, 2], [1, 3]], [[5.0, 1.0], [9.0, 2.0]], 4)
    [0, 1]
    """
    spare = room - sum(map(min, costs))
    if spare < 0:
        return None
    extra = [[cost - min(group) for cost in group] for group in costs]
    spare = min(spare, sum(map(max, extra)))
    unit = max(math.gcd(*(cost for group in extra for cost in group)), 1)
    unit = max(unit, -(-spare // UNITS))
    steps = spare // unit
    best = np.zeros(steps + 1)  # by steps spent at most, over the groups so far
    taken = []
    for group, loss in zip(extra, losses, strict=True):
        options = np.full((len(group), steps + 1), math.inf)
        for at, cost in enumerate(group):
            if (shift := -(-cost // unit)) <= steps:
                options[at, shift:] = best[: steps + 1 - shift] + loss[at]
        taken.append(options.argmin(0).astype(np.int16))
        best = options.min(0)
    if not math.isfinite(best[steps]):
        return None
    out, at = [], steps
    for group, choice in zip(reversed(extra), reversed(taken), strict=True):
        out.append(int(choice[at]))
        at -= -(-group[out[-1]] // unit)
    return out[::-1]


def with_formats(scheme: Scheme, groups: Sequence[Sequence[Linear]], specs: Sequence[IntFormat]) -> Scheme:
    """``scheme`` with the formats of the groups' linears, by full names; what it said of them before goes.

    Overrides by glob stay, since they may cover embeddings or what is left in float; a full name comes before them.
    """
    wanted = {one.name: spec for group, spec in zip(groups, specs, strict=True) for one in group}
    kept = replace(scheme, overrides=tuple(pair for pair in scheme.overrides if pair[0] not in wanted))
    changed = tuple((name, spec) for name, spec in wanted.items() if _weight(kept, name) != spec)
    return replace(kept, overrides=(*changed, *kept.overrides))


def _weight(scheme: Scheme, linear: str) -> IntFormat | None:
    found = scheme.override(linear)
    return found[1] if found else scheme.weight
