"""Bit allocation: the format of each linear that minimizes total sensitivity within a bit budget.

Linears that read one tensor (q, k and v; gate and up) are one choice, since runtimes fuse them and then need one
format. For each such group and width the sensitivity is that of the group alone at that width; the sum is minimized
subject to a bound on the stored bits: codes, scales and zero points. That is a multiple-choice knapsack problem, see
``knapsack``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowbit.analysis.knapsack import least_loss
from lowbit.errors import LowbitError
from lowbit.models.architecture import Architecture
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat, integer
from lowbit.quant.scheme import Scheme


@dataclass(frozen=True)
class Linear:
    """A quantized linear and its sensitivity when quantized alone.

    Attributes:
        name: its full name.
        block: its layer's index.
        shape: ``(out, in)``.
        spec: its format; only integers can be allocated.
        sensitivity: sensitivity at that format.
        input: the part of the sensitivity due to its quantized input, which no wider weight reduces.
        rtn: relative error of its own output with weights of integers rounded to nearest, by bits.
        own: the same in its own format.
    """

    name: str
    block: int
    shape: tuple[int, int]
    spec: Format
    sensitivity: float
    input: float
    rtn: dict[int, float]
    own: float

    def sensitivity_at(self, bits: int) -> float:
        """The sensitivity with integers of a width: the weight's part scales with the error of round to nearest.

        >>> linear = Linear("q", 0, (2, 2), IntFormat(4), 0.5, 0.1, {4: 0.02, 8: 0.0001}, 0.02)
        >>> linear.sensitivity_at(4), round(linear.sensitivity_at(8), 6)
        (0.5, 0.102)
        """
        if isinstance(self.spec, IntFormat) and bits == self.spec.bits:
            return self.sensitivity
        now, then = self.own, self.rtn[bits]
        if now == 0:  # exact at this width: also exact when wider; the error when narrower is unknown
            return self.sensitivity if then == 0 else math.inf
        part = max(self.sensitivity - self.input, 0.0)
        return self.sensitivity - part + part * then / now

    def bits_at(self, spec: Format) -> int:
        """Stored bits of the weight in a format: codes, scales and zero points."""
        return round(self.shape[0] * self.shape[1] * spec.bits_per_value(self.shape[1]))


def fused(linears: Sequence[Linear], architecture: Architecture) -> list[list[Linear]]:
    """The linears grouped by shared input, in the order of their groups in the model."""
    members: dict[tuple[int, int], list[Linear]] = {}
    for linear in linears:
        own = linear.name.removeprefix(f"{architecture.blocks}.{linear.block}.")
        groups = architecture.layers[linear.block].groups
        group_index = next(i for i, group in enumerate(groups) if own in group)
        members.setdefault((linear.block, group_index), []).append(linear)
    return [members[key] for key in sorted(members)]


def formats(group: Sequence[Linear], base: IntFormat, bits: Sequence[int]) -> list[IntFormat]:
    """A group's format at each width; the scheme's format where linears differ in more than bits."""
    shared = {integer(linear.spec, "a bit allocation").with_bits(base.bits) for linear in group}
    like = shared.pop() if len(shared) == 1 else base
    return [like.with_bits(b) for b in bits]


def within_budget(
    groups: Sequence[Sequence[Linear]], base: IntFormat, bits: Sequence[int], room: int
) -> list[IntFormat]:
    """The format of each group, of least total sensitivity within ``room`` stored bits.

    Raises ``LowbitError`` where even the smallest widths exceed them.
    """
    choices = [formats(group, base, bits) for group in groups]
    costs = [
        [sum(linear.bits_at(spec) for linear in group) for spec in specs]
        for group, specs in zip(groups, choices, strict=True)
    ]
    losses = [[sum(linear.sensitivity_at(b) for linear in group) for b in bits] for group in groups]
    weights = sum(linear.shape[0] * linear.shape[1] for group in groups for linear in group)
    picked = least_loss(costs, losses, room)
    if picked is None:
        least = sum(map(min, costs)) / weights
        raise LowbitError(
            f"the budget leaves {room / weights:.3f} bits per weight of the blocks; with widths "
            f"{', '.join(map(str, bits))} and no loss in linears that are exact now, at least {least:.3f} are "
            "needed: raise --budget or give smaller --bits"
        )
    return [specs[index] for specs, index in zip(choices, picked, strict=True)]


def with_formats(scheme: Scheme, groups: Sequence[Sequence[Linear]], specs: Sequence[IntFormat]) -> Scheme:
    """``scheme`` with the formats of the groups' linears as overrides by full name, which replace earlier ones.

    Glob overrides stay, since they may cover embeddings or modules left in float; full names take precedence.
    """
    chosen = {linear.name: spec for group, spec in zip(groups, specs, strict=True) for linear in group}
    kept = replace(scheme, overrides=tuple(pair for pair in scheme.overrides if pair[0] not in chosen))
    changed = tuple((name, spec) for name, spec in chosen.items() if _weight(kept, name) != spec)
    return replace(kept, overrides=(*changed, *kept.overrides))


def _weight(scheme: Scheme, linear: str) -> Format | None:
    formats = scheme.module(linear)
    return formats.weight if formats else None
