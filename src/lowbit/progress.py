"""Progress on standard error: a bar with remaining time on a terminal, occasional lines elsewhere.

Standard output has results only (so that ``--json`` is one document); everything here writes to standard error. In a
log or a pipe, where a bar would be a screenful of carriage returns, a long step prints its progress as a line, first
after ``FIRST`` seconds, then at most every ``EVERY`` seconds. Short steps print nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lowbit.errors import printable

T = TypeVar("T")

FIRST, EVERY = 15.0, 30.0  # seconds
console = Console(stderr=True)
clock: Callable[[], float] = time.monotonic
_printed = -math.inf  # time of the last printed line of any step


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` and show how many are done and the remaining time.

    ``total`` is only needed where ``items`` has no length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not console.is_terminal:
        yield from _log(items, description, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(items, total=total, description=description)


def say(message: str) -> None:
    """Print one line on standard error: a warning, a fallback, a choice; names from files do not break it."""
    console.print(printable(message), highlight=False, markup=False, emoji=False, soft_wrap=True)


def _log(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    """Yield ``items`` and print progress lines between them, see ``EVERY``."""
    global _printed
    start = clock()
    for done, item in enumerate(items, start=1):
        yield item
        now = clock()
        if done != total and now - start >= FIRST and now - _printed >= EVERY:
            _printed = now
            say(line(description, done, total, now - start))


def line(description: str, done: int, total: int | None, seconds: float) -> str:
    """The progress of a step as a line.

    >>> line("quantizing", 6, 30, 90.0)
    'quantizing: 6 of 30 (20 %), about 6 min left'
    >>> line("converting", 6, None, 90.0)
    'converting: 6 done in 90 s'
    """
    if total is None:
        return f"{description}: {done} done in {seconds:.0f} s"
    remaining = duration(seconds / done * (total - done))
    return f"{description}: {done} of {total} ({100 * done / total:.0f} %), about {remaining} left"


def duration(seconds: float) -> str:
    """A duration in readable units.

    >>> duration(42.3), duration(400), duration(9000)
    ('42 s', '7 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
