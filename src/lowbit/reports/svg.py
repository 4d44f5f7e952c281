"""Inline SVG: elements, scales and axes; colours are CSS classes, so that the page's theme applies.

Rejected: a plotting library's SVG, which has its own fonts and colours and ignores the page's theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

Element = ElementTree.Element
WIDTH, HEIGHT = 560, 300
FINE = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # first digits of ticks where an axis spans less than a decade
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 54  # room for labels that are larger on a phone


def drawing(label: str, width: int = WIDTH, height: int = HEIGHT) -> Element:
    """An empty drawing; ``label`` is read by screen readers."""
    root = Element("svg", viewBox=f"0 0 {width} {height}", role="img")
    root.set("class", "chart")
    root.set("aria-label", label)
    return root


def add(parent: Element, tag: str, text: str | None = None, kind: str | None = None, **attributes: object) -> Element:
    """A new element; ``kind`` is its class, ``_`` in attribute names stands for ``-``, numbers are rounded.

    >>> markup(add(Element("g"), "text", "a < b", kind="tick", x=1 / 3, text_anchor="end"))
    Markup('<text x="0.33" text-anchor="end" class="tick">a &lt; b</text>')
    """
    element = ElementTree.SubElement(parent, tag)
    for name, value in attributes.items():
        element.set(
            name.replace("_", "-"), f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        )
    if kind:
        element.set("class", kind)
    element.text = text
    return element


def markup(root: Element) -> Markup:
    """The drawing as safe markup: ``ElementTree`` escapes all text."""
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def short(value: float) -> str:
    """A number for a label, at three digits.

    >>> [short(v) for v in (0, 0.01234, 3.14159, 512, 20000, 2.5e-7)]
    ['0', '0.0123', '3.14', '512', '20k', '2.5e-7']
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e4 <= abs(value) < 1e6:
        return f"{value / 1e3:.3g}k"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


@dataclass(frozen=True)
class Scale:
    """Maps values to coordinates: ``low`` to ``start``, ``high`` to ``stop``.

    >>> Scale(1, 100, 0, 10, log=True)(10)
    5.0
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    def ticks(self, count: int = 5, least: float = 0.0) -> list[float]:
        """About ``count`` round values in range, on a linear scale at least ``least`` apart.

        >>> Scale(0, 29, 0, 1).ticks(), Scale(0.02, 3, 0, 1, log=True).ticks()
        ([0.0, 10.0, 20.0], [0.03, 0.1, 0.3, 1.0, 3.0])
        """
        if not self.log:
            step = _round_step(max((self.high - self.low) / count, least))
            first = math.ceil(self.low / step - 1e-9)
            return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        span = math.log10(self.high / self.low)
        digits = (1,) if span > 2.2 else (1, 3) if span > 1.2 else (1, 2, 5) if span > 0.6 else FINE
        inside = [v for e in decades for d in digits if self.low <= (v := float(f"{d}e{e}")) <= self.high]
        return inside[:: max(1, math.ceil(len(inside) / (count + 1)))]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, ... that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= least * (1 - 1e-9))


def spread(values: Iterable[float], log: bool, base: float = 0.0) -> tuple[float, float]:
    """Ends of an axis that includes all values and, if linear, ``base``."""
    if log:
        return (min(values := list(values)) / 1.15, max(values) * 1.15)
    low, high = min(values := [base, *values]), max(values)
    margin = 0.06 * (high - low) or 1.0
    return (low - margin if low < base else low, high + margin)


def axes(root: Element, x: Scale, y: Scale, x_label: str, y_label: str) -> None:
    """Grid lines, ticks and axis labels."""
    for value in y.ticks():
        add(root, "line", kind="rule", x1=float(LEFT), x2=float(WIDTH - RIGHT), y1=y(value), y2=y(value))
        add(root, "text", short(value), "tick", x=LEFT - 8.0, y=y(value) + 4, text_anchor="end")
    for value in x.ticks(6, least=1):  # blocks, epochs, channels
        add(root, "text", short(value), "tick", x=x(value), y=HEIGHT - BOTTOM + 20.0, text_anchor="middle")
    add(root, "text", x_label, "label", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 10.0, text_anchor="middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    label = add(root, "text", y_label, "label", text_anchor="middle")
    label.set("transform", f"translate(15 {middle:g}) rotate(-90)")
