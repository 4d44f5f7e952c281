"""Is the divergence of an assignment the sum of its parts? Where it is not, a second round around the solution.

Errors of one block meet those of others: together they may cost more than their sum, or less. The divergence of the
whole assignment is measured; where it is far from the sum, so is the divergence without each block's errors, and the
block's expected losses are scaled to what the assignment loses by it. The second solution stays if it measures
better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lowbit.allocation.divergence import divergences
from lowbit.allocation.goal import Goal
from lowbit.allocation.losses import Formats, Losses, block_of
from lowbit.allocation.solution import Solution
from lowbit.exporters.footprint import Footprint
from lowbit.progress import say
from lowbit.runs.streamed_model import StreamedModel

TOLERANCE = 1.25  # measured over expected, either way, up to which a sum is taken for additive
MOST = 4.0  # largest change of a block's losses


@dataclass(frozen=True)
class Settled:
    """A solution whose divergence was measured.

    Attributes:
        solution: the assignment.
        measured: its divergence in nats per token, weights rounded to nearest.
        rounds: 1, or 2 where the losses were estimated again.
    """

    solution: Solution
    measured: float
    rounds: int


def settle(
    footprint: Footprint,
    losses: Losses,
    goal: Goal,
    model: StreamedModel,
    columns: Mapping[str, Tensor],
    ids: Tensor,
) -> Settled:
    """The better of the first solution and that of a second round, if there is one."""
    blocks_at = model.skeleton.architecture.blocks
    first = goal.solve(footprint, losses, blocks_at)
    (whole,) = divergences(model, [first.formats], columns, ids)
    if first.expected <= 0 or 1 / TOLERANCE <= whole / first.expected <= TOLERANCE:
        return Settled(first, whole, 1)
    say(f"measured divergence {whole:.4g}, expected {first.expected:.4g}: estimating again around this solution")
    second = goal.solve(footprint, around(footprint, losses, first, whole, model, columns, ids), blocks_at)
    if second.formats == first.formats:
        return Settled(first, whole, 1)
    (again,) = divergences(model, [second.formats], columns, ids)
    return Settled(second, again, 2) if goal.prefers(second, again, first, whole) else Settled(first, whole, 1)


def around(
    footprint: Footprint,
    losses: Losses,
    solution: Solution,
    whole: float,
    model: StreamedModel,
    columns: Mapping[str, Tensor],
    ids: Tensor,
) -> Losses:
    """``losses`` with each block's scaled to what ``solution`` loses by the block's errors."""
    blocks_at = model.skeleton.architecture.blocks
    indices = sorted({block_of(module, blocks_at) for module in solution.formats})
    without = [_without(solution.formats, index, blocks_at) for index in indices]
    measured = divergences(model, without, columns, ids)
    expected = dict.fromkeys(indices, 0.0)
    for choice in footprint.choices:
        for index, loss in losses.by_block(choice, solution.formats[choice.modules[0]], blocks_at).items():
            expected[index] += loss
    return replace(losses, blocks=factors(expected, {i: whole - kl for i, kl in zip(indices, measured, strict=True)}))


def factors(expected: Mapping[int, float], lost: Mapping[int, float]) -> dict[int, float]:
    """By block, what it costs over what was expected, within ``MOST`` either way.

    >>> factors({0: 1.0, 1: 2.0, 2: 0.0}, {0: 0.5, 1: 20.0, 2: 0.1})
    {0: 0.5, 1: 4.0, 2: 1.0}
    """
    out = {}
    for index, value in expected.items():
        ratio = lost[index] / value if value > 0 else 1.0
        out[index] = min(max(ratio, 1 / MOST), MOST)
    return out


def _without(formats: Formats, index: int, blocks_at: str) -> Formats:
    return {module: None if block_of(module, blocks_at) == index else format for module, format in formats.items()}
