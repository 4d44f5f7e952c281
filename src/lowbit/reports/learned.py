"""What the steps of a recipe recorded about a block: loss curves, learned maps, reassembled channels.

Read by the names of the figures, not of the methods: a step that records ``held_out`` has a loss curve, one that
records ``copies`` for a linear took its channels apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lowbit.reports.charts import Curve, Series, bars, by_depth, lines
from lowbit.reports.facts import RunFacts
from lowbit.reports.pixels import signed


def records(run: RunFacts) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """``(block, step, figures)`` of everything that steps recorded."""
    for row in run.blocks:
        for step, figures in row.steps.items():
            yield row.block, step, figures


@dataclass(frozen=True)
class Losses:
    """One step's fits: charts of held-out and training loss by epoch, and what happened in words."""

    step: str
    charts: list[tuple[str, Markup]]
    summary: str


def losses(run: RunFacts) -> list[Losses]:
    """For each step that learned something."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for block, step, figures in records(run):
        if figures.get("loss"):
            found.setdefault(step, {})[block] = figures
    return [_losses(step, fits) for step, fits in found.items()]


def _losses(step: str, fits: Mapping[int, Mapping[str, Any]]) -> Losses:
    held = [Curve(b, _points(f.get("held_out", []), 0), f.get("best_epoch", 0)) for b, f in fits.items()]
    train = [Curve(b, _points(f["loss"], 1), f.get("best_epoch", 0)) for b, f in fits.items()]
    charts = [
        (name, drawn)
        for name, curves in (("on held-out sequences", held), ("in training", train))
        if (drawn := by_depth(f"{step}: loss of each block {name}", curves))
    ]
    gains = [min(v for _, v in c.points) / c.points[0][1] for c in held if c.points and c.points[0][1] > 0]
    start = sum(f.get("best_epoch", 0) == 0 for f in fits.values())
    said = ["one fit" if len(fits) == 1 else f"{len(fits)} fits"]
    unit = next(iter(fits.values())).get("unit")
    if unit and held[0].points:
        (_, first), least = held[0].points[0], min(value for _, value in held[0].points)
        said = [f"of the whole model: from {first:.3f} to {least:.3f} {unit} on held-out sequences"]
    elif gains:
        said.append(
            f"the median one took the held-out error to {100 * sorted(gains)[len(gains) // 2]:.0f} % of its start"
        )
    if start:
        said.append(f"{start} kept their start, since nothing learned was better")
    return Losses(step, charts, "; ".join(said))


def _points(values: list[float | None], first: int) -> list[tuple[float, float]]:
    return [
        (float(at), value) for at, value in enumerate(values, first) if value is not None and math.isfinite(value)
    ]


@dataclass(frozen=True)
class LearnedMatrix:
    """A learned matrix to look at: where it is, its picture, bound on its condition number, dominance margin."""

    block: int
    site: str
    image: str
    condition: float | None
    margin: float | None


def matrices(run: RunFacts) -> list[LearnedMatrix]:
    """All that were kept, by block."""
    facts = {(step, at): one for _, step, figures in records(run) for at, one in figures.get("sites", {}).items()}
    out = []
    for (block, step, site), matrix in sorted(run.pictures.items(), key=lambda item: item[0]):
        one = facts.get((step, f"{block}.{site}"), {})
        out.append(LearnedMatrix(block, site, signed(matrix), one.get("condition"), one.get("margin")))
    return out


def conditions(run: RunFacts) -> list[tuple[str, Markup | None]]:
    """Charts of the maps' conditions, of matrices' dominance margins, of signs, by block; a line for each site."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {"condition": {}, "margin": {}, "turned_over": {}}
    for _, _, figures in records(run):
        for name, one in figures.get("sites", {}).items():
            block, _, site = name.partition(".")
            for what, by_site in found.items():
                if one.get(what) is not None:
                    by_site.setdefault(f"{site} ({one['map']})", []).append((float(block), one[what]))
    if not found["condition"]:
        return []
    order = list(found["condition"])
    labels = (
        ("condition", "condition number", " of each learned map", True),
        ("margin", "dominance margin", " of each learned map", False),
        ("turned_over", "channels turned over", " at each site", False),
    )
    return [
        (label, lines(f"{label}{of} by block", series, "block", label, log=log))
        for what, label, of, log in labels
        if (series := [Series(site, points, order.index(site)) for site, points in found[what].items()])
    ]


def legend(run: RunFacts) -> list[str]:
    """Sites with learned maps in the order of their colours in ``conditions``."""
    names = (
        (f"{name.partition('.')[2]} ({one['map']})")
        for _, _, f in records(run)
        for name, one in f.get("sites", {}).items()
    )
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Reassembly:
    """Channels taken apart before one linear of each block: charts of copies and of what they brought, in words."""

    linear: str
    charts: list[tuple[str, Markup]]
    summary: str


def reassemblies(run: RunFacts, style: int = 0) -> list[Reassembly]:
    """For each linear before which a step reassembled channels; ``style`` is the run's colour."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for block, _, figures in records(run):
        for name, one in figures.items():
            if isinstance(one, Mapping) and "copies" in one:
                index, _, linear = name.partition(".")
                found.setdefault(linear, {})[int(index) if index.isdigit() else block] = one
    return [_reassembly(linear, choices, style) for linear, choices in found.items()]


def _reassembly(linear: str, choices: Mapping[int, Mapping[str, Any]], style: int) -> Reassembly:
    copies = [(float(block), float(one["copies"])) for block, one in choices.items()]
    kept = {
        block: one["scores"][str(one["copies"])] / one["scores"]["0"]
        for block, one in choices.items()
        if one.get("scores", {}).get("0")
    }
    errors = [Series("after", [(float(block), 100 * share) for block, share in kept.items()], style)]
    drawn = (
        ("channels added as copies", bars(f"{linear}: copies added in each block", copies, "block", "copies", style)),
        ("error left, % of without", lines(f"{linear}: error with copies", errors, "block", "error, % of without")),
    )
    some = sum(count > 0 for _, count in copies)
    how = ", ".join(sorted({str(one.get("assembly", "drop")) for one in choices.values()}))
    summary = f"channels taken apart in {some} of {len(copies)} blocks; room was made by: {how}"
    return Reassembly(linear, [(name, chart) for name, chart in drawn if chart], summary)
