"""The expected divergence at all sizes: one knapsack table has the best assignment for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lowbit.allocation.losses import Losses
from lowbit.allocation.solution import best_within
from lowbit.exporters.footprint import Footprint

FORMAT = "lowbit-frontier-1"
POINTS = 16


@dataclass(frozen=True)
class Point:
    """The best assignment of a size.

    Attributes:
        size_bytes: of the target's file.
        bits: per weight that has a format.
        expected: divergence in nats per token.
        formats: how many modules have each.
    """

    size_bytes: int
    bits: float
    expected: float
    formats: dict[str, int]


@dataclass(frozen=True)
class Full:
    """A point that was quantized, exported, verified and compared; attributes as in ``api.Fitted``."""

    size_bytes: int
    expected: float
    measured: float
    perplexity: dict[str, float]
    kl: dict[str, float]
    verified: bool
    file: str


@dataclass(frozen=True)
class QuantizerFile:
    """A file of the target's own quantizer: its name of the type; the rest as in ``Full``."""

    name: str
    size_bytes: int
    perplexity: dict[str, float]
    kl: dict[str, float]
    file: str


@dataclass(frozen=True)
class Frontier:
    """Points of one model and target, smallest first.

    Attributes:
        model, target: their names.
        points: the best assignments by size.
        full: those that were made in full.
        quantizer: files of the target's own quantizer, where it is installed.
    """

    model: str
    target: str
    points: list[Point]
    full: list[Full]
    quantizer: list[QuantizerFile] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the format's name."""
        return {"format": FORMAT, **asdict(self)}


def points_of(footprint: Footprint, losses: Losses, blocks_at: str, count: int = POINTS) -> list[Point]:
    """``count`` sizes at equal ratios from the smallest file to the largest; equal assignments once."""
    largest = footprint.fixed + sum(max(option.size for option in c.options) for c in footprint.choices)
    out: dict[int, Point] = {}
    for step in range(count):
        room = round(footprint.least * (largest / footprint.least) ** (step / max(count - 1, 1)))
        found = best_within(footprint, losses, max(room, footprint.least), blocks_at)
        names = Counter("float" if format is None else format.name for format in found.formats.values())
        bits = 8 * (found.size - footprint.beside) / footprint.weights
        out[found.size] = Point(found.size, bits, found.expected, dict(names))
    return [out[size] for size in sorted(out)]


def chosen(points: Sequence[Point], count: int) -> list[Point]:
    """``count`` points, spread evenly inside the range, without its ends where there are enough.

    >>> points = [Point(size, 0.0, 0.0, {}) for size in range(16)]
    >>> [point.size_bytes for point in chosen(points, 3)], chosen(points[:1], 3) == points[:1]
    ([4, 8, 11], True)
    """
    places = dict.fromkeys(round((len(points) - 1) * (at + 1) / (count + 1)) for at in range(count))
    return [points[place] for place in places]
