"""Records of a recipe's steps about a block: loss curves, learned maps, reassembled channels.

Records are recognized by their keys, not by the method: a step that records ``held_out`` has a loss curve, one that
records ``copies`` for a linear disassembled its channels.
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
    """``(block, step, figures)`` of all records."""
    for row in run.blocks:
        for step, figures in row.steps.items():
            yield row.block, step, figures


@dataclass(frozen=True)
class Losses:
    """One step's fits: charts of validation and training loss by epoch, and a summary."""

    step: str
    charts: list[tuple[str, Markup]]
    summary: str


def losses(run: RunFacts) -> list[Losses]:
    """Loss curves of each learned step."""
    fits_by_step: dict[str, dict[int, Mapping[str, Any]]] = {}
    for block, step, figures in records(run):
        if figures.get("loss"):
            fits_by_step.setdefault(step, {})[block] = figures
    return [_losses(step, fits) for step, fits in fits_by_step.items()]


def _losses(step: str, fits: Mapping[int, Mapping[str, Any]]) -> Losses:
    held = [Curve(b, _points(f.get("held_out", []), 0), f.get("best_epoch", 0)) for b, f in fits.items()]
    train = [Curve(b, _points(f["loss"], 1), f.get("best_epoch", 0)) for b, f in fits.items()]
    charts = [
        (name, drawn)
        for name, curves in (("on the validation split", held), ("in training", train))
        if (drawn := by_depth(f"{step}: loss of each block {name}", curves))
    ]
    gains = [min(v for _, v in c.points) / c.points[0][1] for c in held if c.points and c.points[0][1] > 0]
    start = sum(f.get("best_epoch", 0) == 0 for f in fits.values())
    sentences = ["one fit" if len(fits) == 1 else f"{len(fits)} fits"]
    unit = next(iter(fits.values())).get("unit")
    if unit and held[0].points:
        (_, first), least = held[0].points[0], min(value for _, value in held[0].points)
        sentences = [f"of the whole model: from {first:.3f} to {least:.3f} {unit} on the validation split"]
    elif gains:
        sentences.append(
            f"the median fit reduced the validation loss to {100 * sorted(gains)[len(gains) // 2]:.0f} % of its start"
        )
    if start:
        sentences.append(f"{start} kept their initial parameters, since no epoch was better")
    return Losses(step, charts, "; ".join(sentences))


def _points(values: list[float | None], first: int) -> list[tuple[float, float]]:
    return [
        (float(epoch), value)
        for epoch, value in enumerate(values, first)
        if value is not None and math.isfinite(value)
    ]


@dataclass(frozen=True)
class LearnedMatrix:
    """A learned matrix: block, site, image, bound on its condition number, dominance margin."""

    block: int
    site: str
    image: str
    condition: float | None
    margin: float | None


def matrices(run: RunFacts) -> list[LearnedMatrix]:
    """All stored matrices, by block."""
    facts = {
        (step, name): site for _, step, figures in records(run) for name, site in figures.get("sites", {}).items()
    }
    out = []
    for (block, step, site), matrix in sorted(run.pictures.items(), key=lambda item: item[0]):
        figures = facts.get((step, f"{block}.{site}"), {})
        out.append(LearnedMatrix(block, site, signed(matrix), figures.get("condition"), figures.get("margin")))
    return out


def conditions(run: RunFacts) -> list[tuple[str, Markup | None]]:
    """Charts of the maps' condition numbers, dominance margins and sign flips by block; a line for each site."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {"condition": {}, "margin": {}, "turned_over": {}}
    for _, _, figures in records(run):
        for name, values in figures.get("sites", {}).items():
            block, _, site = name.partition(".")
            for key, by_site in curves.items():
                if values.get(key) is not None:
                    by_site.setdefault(f"{site} ({values['map']})", []).append((float(block), values[key]))
    if not curves["condition"]:
        return []
    order = list(curves["condition"])
    labels = (
        ("condition", "condition number", " of each learned map", True),
        ("margin", "dominance margin", " of each learned map", False),
        ("turned_over", "sign flips", " at each site", False),
    )
    return [
        (label, lines(f"{label}{of} by block", series, "block", label, log=log))
        for key, label, of, log in labels
        if (series := [Series(site, points, order.index(site)) for site, points in curves[key].items()])
    ]


def legend(run: RunFacts) -> list[str]:
    """Sites with learned maps, in the order of their colours in ``conditions``."""
    names = (
        (f"{name.partition('.')[2]} ({values['map']})")
        for _, _, f in records(run)
        for name, values in f.get("sites", {}).items()
    )
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Reassembly:
    """Channel reassembly before one linear of each block: charts of copies and remaining error, and a summary."""

    linear: str
    charts: list[tuple[str, Markup]]
    summary: str


def reassemblies(run: RunFacts, style: int = 0) -> list[Reassembly]:
    """Channel reassembly by linear; ``style`` is the run's colour."""
    by_linear: dict[str, dict[int, Mapping[str, Any]]] = {}
    for block, _, figures in records(run):
        for name, choice in figures.items():
            if isinstance(choice, Mapping) and "copies" in choice:
                index, _, linear = name.partition(".")
                by_linear.setdefault(linear, {})[int(index) if index.isdigit() else block] = choice
    return [_reassembly(linear, choices, style) for linear, choices in by_linear.items()]


def _reassembly(linear: str, choices: Mapping[int, Mapping[str, Any]], style: int) -> Reassembly:
    copies = [(float(block), float(choice["copies"])) for block, choice in choices.items()]
    remaining = {
        block: choice["scores"][str(choice["copies"])] / choice["scores"]["0"]
        for block, choice in choices.items()
        if choice.get("scores", {}).get("0")
    }
    errors = [Series("after", [(float(block), 100 * share) for block, share in remaining.items()], style)]
    drawn = (
        ("channels added as copies", bars(f"{linear}: copies added in each block", copies, "block", "copies", style)),
        (
            "remaining error, % of without",
            lines(f"{linear}: error with copies", errors, "block", "error, % of without"),
        ),
    )
    disassembled = sum(count > 0 for _, count in copies)
    how = ", ".join(sorted({str(choice.get("assembly", "drop")) for choice in choices.values()}))
    summary = f"channels disassembled in {disassembled} of {len(copies)} blocks; assembly: {how}"
    return Reassembly(linear, [(name, chart) for name, chart in drawn if chart], summary)
