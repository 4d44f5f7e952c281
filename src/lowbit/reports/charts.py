"""The report's charts: lines, many lines by depth, bars, cells."""

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
COLOURS = 6  # then they begin again


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: for the legend and for what shows at its points.
        points: ``(x, y)``; what is not finite, and on a logarithmic axis what is not above 0, is left out.
        style: number of its colour, of ``COLOURS``, or ``float`` for the float model's.
    """

    name: str
    points: Points
    style: int | str = 0

    @property
    def kind(self) -> str:
        """Its class on the page."""
        return f"series s-{self.style if isinstance(self.style, str) else self.style % COLOURS}"


def _drawable(series: Iterable[Series], log: bool) -> list[Series]:
    kept = []
    for one in series:
        points = [(x, y) for x, y in one.points if math.isfinite(y) and (y > 0 or not log)]
        if points:
            kept.append(Series(one.name, points, one.style))
    return kept


def _scales(series: Sequence[Series], log: bool, base: float = 0.0) -> tuple[Scale, Scale]:
    xs = [x for one in series for x, _ in one.points]
    room = 0.5 if min(xs) == max(xs) else 0.0
    across = Scale(min(xs) - room, max(xs) + room, LEFT + 8, WIDTH - RIGHT - 8)
    low, high = spread((y for one in series for _, y in one.points), log, base)
    return across, Scale(low, high, HEIGHT - BOTTOM, TOP, log)


def lines(
    label: str, series: Iterable[Series], x_label: str, y_label: str, log: bool = False, dots: bool = True
) -> Markup | None:
    """A line chart, ``None`` where there is nothing to draw; a point shows its value when it is pointed at."""
    shown = _drawable(series, log)
    if not shown:
        return None
    root = drawing(label)
    x, y = _scales(shown, log)
    axes(root, x, y, x_label, y_label)
    for one in shown:
        group = add(root, "g", kind=one.kind)
        add(group, "title", one.name)
        add(group, "path", kind="line", d=path(one.points, x, y))
        if dots:
            for at, value in one.points:
                point = add(group, "circle", cx=x(at), cy=y(value), r=3.2)
                add(point, "title", f"{one.name}, {x_label} {short(at)}: {short(value)}")
    return markup(root)


def path(points: Points, x: Scale, y: Scale) -> str:
    """A path's commands."""
    return "M" + "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value in points)


@dataclass(frozen=True)
class Curve:
    """One fit's course: its block, its losses by epoch, and the epoch whose parameters were kept."""

    block: int
    points: Points
    best: int


def by_depth(label: str, curves: Sequence[Curve]) -> Markup | None:
    """Losses of many blocks in percent of their first, coloured from the first block to the last; a dot marks what
    was kept."""
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
        for at, value in points:
            if at == curve.best:
                add(group, "circle", cx=x(at), cy=y(value), r=3.2)
    return markup(root)


def bars(label: str, values: Points, x_label: str, y_label: str, style: int = 0) -> Markup | None:
    """One bar for each whole ``x``, from 0."""
    if not values or all(value == 0 for _, value in values):
        return None
    root = drawing(label)
    low, high = min(x for x, _ in values), max(x for x, _ in values)
    x = Scale(low - 0.5, high + 0.5, LEFT, WIDTH - RIGHT)
    y = Scale(*spread((value for _, value in values), False), HEIGHT - BOTTOM, TOP)
    axes(root, x, y, x_label, y_label)
    group = add(root, "g", kind=f"series s-{style}")
    wide = min(0.8 * (x(1) - x(0)), 40.0)
    for at, value in values:
        bar = add(group, "rect", kind="bar", x=x(at) - wide / 2, y=y(value), width=wide, height=y(0) - y(value))
        add(bar, "title", f"{x_label} {short(at)}: {short(value)}")
    return markup(root)


def cells(
    label: str, rows: Sequence[str], values: Mapping[tuple[int, int], float], x_label: str, high: float
) -> Markup | None:
    """A grid of values by ``(row, x)``: the stronger the larger, logarithmic over three decades to ``high``."""
    shown = {place: value for place, value in values.items() if value > 0 and math.isfinite(value)}
    if not shown:
        return None
    strength, last = Scale(high / 1e3, high, 0.06, 1.0, log=True), max(at for _, at in shown)
    tall, bottom = 26.0, TOP + 26.0 * len(rows)
    root = drawing(label, height=round(bottom) + BOTTOM)
    x = Scale(-0.5, last + 0.5, LEFT + 50, WIDTH - RIGHT)
    for row, name in enumerate(rows):
        add(root, "text", name, "tick", x=LEFT + 42.0, y=TOP + tall * (row + 0.5) + 5, text_anchor="end")
    for (row, at), value in shown.items():
        left, top, wide = x(at - 0.5) + 0.5, TOP + tall * row + 0.5, x(1) - x(0) - 1
        cell = add(root, "rect", kind="cell", x=left, y=top, width=wide, height=tall - 1)
        cell.set("fill-opacity", f"{strength(max(value, high / 1e3)):.2f}")
        add(cell, "title", f"{x_label} {at}, {rows[row]}: {short(value)}")
    for tick in x.ticks(6, least=1):
        add(root, "text", short(tick), "tick", x=x(tick), y=bottom + 20, text_anchor="middle")
    add(root, "text", x_label, "label", x=(x.start + x.stop) / 2, y=bottom + BOTTOM - 10, text_anchor="middle")
    return markup(root)
