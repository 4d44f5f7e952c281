"""The report's charts: lines, lines coloured by depth, bars, heat maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lowbit.reports.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    add,
    axes,
    drawing,
    markup,
    short,
    spread,
)

Points = Sequence[tuple[float, float]]
COLOURS = 6  # further series reuse them


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: in the legend and in tooltips.
        points: ``(x, y)``; non-finite values, and on a logarithmic axis values not above 0, are skipped.
        style: index of its colour, modulo ``COLOURS``, or ``float`` for the float model.
    """

    name: str
    points: Points
    style: int | str = 0

    @property
    def kind(self) -> str:
        """CSS class."""
        return f"series s-{self.style if isinstance(self.style, str) else self.style % COLOURS}"


def _drawable(series: Iterable[Series], log: bool) -> list[Series]:
    drawable = []
    for line in series:
        points = [(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not log)]
        if points:
            drawable.append(Series(line.name, points, line.style))
    return drawable


def _scales(series: Sequence[Series], log: bool, base: float = 0.0) -> tuple[Scale, Scale]:
    xs = [x for line in series for x, _ in line.points]
    margin = 0.5 if min(xs) == max(xs) else 0.0
    across = Scale(min(xs) - margin, max(xs) + margin, LEFT + 8, WIDTH - RIGHT - 8)
    low, high = spread((y for line in series for _, y in line.points), log, base)
    return across, Scale(low, high, HEIGHT - BOTTOM, TOP, log)


def lines(
    label: str, series: Iterable[Series], x_label: str, y_label: str, log: bool = False, dots: bool = True
) -> Markup | None:
    """A line chart, ``None`` without data; tooltips show the values of points."""
    shown = _drawable(series, log)
    if not shown:
        return None
    root = drawing(label)
    x, y = _scales(shown, log)
    axes(root, x, y, x_label, y_label)
    for line in shown:
        group = add(root, "g", kind=line.kind)
        add(group, "title", line.name)
        add(group, "path", kind="line", d=path(line.points, x, y))
        if dots:
            for position, value in line.points:
                point = add(group, "circle", cx=x(position), cy=y(value), r=3.2)
                add(point, "title", f"{line.name}, {x_label} {short(position)}: {short(value)}")
    return markup(root)


def path(points: Points, x: Scale, y: Scale) -> str:
    """SVG path data."""
    return "M" + "L".join(f"{x(position):.1f} {y(value):.1f}" for position, value in points)


@dataclass(frozen=True)
class Curve:
    """Loss curve of one fit: its block, its losses by epoch, and the epoch whose parameters were kept."""

    block: int
    points: Points
    best: int


def by_depth(label: str, curves: Sequence[Curve]) -> Markup | None:
    """Losses of many blocks in percent of their initial loss, coloured by depth; a dot marks the kept epoch."""
    drawn = [(c, [(x, 100 * y / c.points[0][1]) for x, y in c.points]) for c in curves if c.points and c.points[0][1]]
    if not drawn:
        return None
    root, last = drawing(label), max(curve.block for curve in curves) or 1
    x, y = _scales([Series("", points) for _, points in drawn], log=False, base=100.0)
    axes(root, x, y, "epoch", "loss, % of the first")
    for curve, points in drawn:
        group = add(root, "g", kind="series depth", style=f"--depth:{100 * curve.block / last:.0f}%")
        ends = f"from {short(curve.points[0][1])} to {short(min(v for _, v in curve.points))}"
        add(group, "title", f"block {curve.block}: {ends}, epoch {curve.best} was kept")
        add(group, "path", kind="line", d=path(points, x, y))
        for epoch, value in points:
            if epoch == curve.best:
                add(group, "circle", cx=x(epoch), cy=y(value), r=3.2)
    return markup(root)


def bars(label: str, values: Points, x_label: str, y_label: str, style: int = 0) -> Markup | None:
    """A bar chart with one bar for each integer ``x``, from 0."""
    if not values or all(value == 0 for _, value in values):
        return None
    root = drawing(label)
    low, high = min(x for x, _ in values), max(x for x, _ in values)
    x = Scale(low - 0.5, high + 0.5, LEFT, WIDTH - RIGHT)
    y = Scale(*spread((value for _, value in values), False), HEIGHT - BOTTOM, TOP)
    axes(root, x, y, x_label, y_label)
    group = add(root, "g", kind=f"series s-{style}")
    bar_width = min(0.8 * (x(1) - x(0)), 40.0)
    for position, value in values:
        bar = add(
            group,
            "rect",
            kind="bar",
            x=x(position) - bar_width / 2,
            y=y(value),
            width=bar_width,
            height=y(0) - y(value),
        )
        add(bar, "title", f"{x_label} {short(position)}: {short(value)}")
    return markup(root)


def cells(
    label: str, rows: Sequence[str], values: Mapping[tuple[int, int], float], x_label: str, high: float
) -> Markup | None:
    """A heat map of values by ``(row, x)``: opacity is logarithmic over the three decades up to ``high``."""
    shown = {place: value for place, value in values.items() if value > 0 and math.isfinite(value)}
    if not shown:
        return None
    strength, last = Scale(high / 1e3, high, 0.06, 1.0, log=True), max(column for _, column in shown)
    row_height, bottom = 26.0, TOP + 26.0 * len(rows)
    root = drawing(label, height=round(bottom) + BOTTOM)
    x = Scale(-0.5, last + 0.5, LEFT + 50, WIDTH - RIGHT)
    for row, name in enumerate(rows):
        add(root, "text", name, "tick", x=LEFT + 42.0, y=TOP + row_height * (row + 0.5) + 5, text_anchor="end")
    for (row, column), value in shown.items():
        left, top, cell_width = x(column - 0.5) + 0.5, TOP + row_height * row + 0.5, x(1) - x(0) - 1
        cell = add(root, "rect", kind="cell", x=left, y=top, width=cell_width, height=row_height - 1)
        cell.set("fill-opacity", f"{strength(max(value, high / 1e3)):.2f}")
        add(cell, "title", f"{x_label} {column}, {rows[row]}: {short(value)}")
    for tick in x.ticks(6, least=1):
        add(root, "text", short(tick), "tick", x=x(tick), y=bottom + 20, text_anchor="middle")
    add(root, "text", x_label, "label", x=(x.start + x.stop) / 2, y=bottom + BOTTOM - 10, text_anchor="middle")
    return markup(root)
