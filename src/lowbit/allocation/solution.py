"""The assignment of formats with the least expected divergence in a size, or the smallest one within a divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.allocation.losses import Formats, Losses, formats_of
from lowbit.allocation.size import megabytes
from lowbit.analysis.knapsack import solve
from lowbit.errors import LowbitError
from lowbit.exporters.footprint import Footprint
from lowbit.quant.format import Format
from lowbit.quant.scheme_names import override_text


@dataclass(frozen=True)
class Solution:
    """An assignment.

    Attributes:
        formats: by module; ``None``: float.
        size: bytes of the target's file.
        expected: divergence in nats per token.
    """

    formats: Formats
    size: int
    expected: float


def check_size(footprint: Footprint, room: int, target: str, option: str = "--size", beside: int = 0) -> None:
    """Refuse a size that no choice of formats reaches; the line says the smallest one that can be.

    Args:
        footprint: the model in the target's file.
        room: bytes for the file.
        target: its name.
        option: what was given.
        beside: bytes that ``option`` has beside the file: keys and values.
    """
    if footprint.least <= room:
        return
    advice = f"the smallest that can be is {option} {megabytes(footprint.least + beside)}"
    given = f"{room + beside:,} bytes given"
    if beside:
        given += f", keys and values take {beside:,} of them"
    if footprint.fixed > room:
        name, size = max(footprint.floats, key=lambda pair: pair[1], default=("metadata", footprint.fixed))
        raise LowbitError(
            f"{given}; what has no format in {target} takes {footprint.fixed:,} alone, {name} {size:,} of them: "
            f"{advice}"
        )
    floats = [choice for choice in footprint.choices if [option.format for option in choice.options] == [None]]
    alone = max(floats, key=lambda choice: choice.least, default=None)
    if alone is not None and footprint.fixed + alone.least > room:
        raise LowbitError(
            f"{given}; {alone.modules[0]}, for which {target} has no format, takes {alone.least:,} in float: {advice}"
        )
    raise LowbitError(f"{given}; with the smallest formats of {target} the model is larger: {advice}")


def best_within(footprint: Footprint, losses: Losses, room: int, blocks_at: str) -> Solution:
    """The least expected divergence in at most ``room`` bytes, which ``check_size`` accepts."""
    table = solve(*_tables(footprint, losses, blocks_at), room - footprint.fixed)
    picks = None if table is None else table.best()
    assert picks is not None, "check_size lets no such size pass"
    return _solution(footprint, losses, picks, blocks_at)


def smallest_within(footprint: Footprint, losses: Losses, most: float, blocks_at: str) -> Solution:
    """The smallest file whose expected divergence is at most ``most`` nats per token.

    Raises:
        LowbitError: the largest formats diverge further.
    """
    costs, table_losses = _tables(footprint, losses, blocks_at)
    table = solve(costs, table_losses, sum(map(max, costs)))
    picks = None if table is None else table.cheapest(most)
    if picks is None:
        least = sum(map(min, table_losses))
        raise LowbitError(
            f"a divergence of {most:.4g} nats per token asked for; the target's largest formats have {least:.4g}: "
            "give a larger --quality"
        )
    return _solution(footprint, losses, picks, blocks_at)


def uniform(footprint: Footprint, losses: Losses, blocks_at: str) -> dict[str, Solution]:
    """By a format's text, every choice in that format; those that lack it in the smallest of at least its bytes."""
    texts: dict[str, Format] = {}
    for choice in footprint.choices:
        texts |= {override_text(o.format): o.format for o in choice.options if o.format is not None}
    out = {}
    for text, format in texts.items():
        picks = [_nearest([option.format for option in c.options], format) for c in footprint.choices]
        out[text] = _solution(footprint, losses, picks, blocks_at)
    return out


def _nearest(formats: Sequence[Format | None], wanted: Format) -> int:
    if wanted in formats:
        return formats.index(wanted)
    bits = [format.bits_per_value(256) if format is not None else 32.0 for format in formats]
    least = wanted.bits_per_value(256)
    return min(range(len(formats)), key=lambda at: (bits[at] < least, abs(bits[at] - least)))


def _tables(footprint: Footprint, losses: Losses, blocks_at: str) -> tuple[list[list[int]], list[list[float]]]:
    costs = [[option.size for option in choice.options] for choice in footprint.choices]
    table = [[losses.of(choice, o.format, blocks_at) for o in choice.options] for choice in footprint.choices]
    return costs, table


def _solution(footprint: Footprint, losses: Losses, picks: Sequence[int], blocks_at: str) -> Solution:
    chosen = [choice.options[pick] for choice, pick in zip(footprint.choices, picks, strict=True)]
    expected = sum(
        losses.of(choice, option.format, blocks_at) for choice, option in zip(footprint.choices, chosen, strict=True)
    )
    size = footprint.fixed + sum(option.size for option in chosen)
    return Solution(formats_of(footprint.choices, picks), size, expected)
