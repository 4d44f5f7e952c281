"""Progress on standard error: a bar with time left on a terminal, nothing elsewhere.

Standard output carries results only (so that ``--json`` is one document), hence everything here writes to
standard error. Off a terminal there are no bars: a log file full of carriage returns helps nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
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

T = TypeVar("T")

console = Console(stderr=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` while a bar shows how many are done and how long the rest takes.

    ``total`` is only needed where ``items`` has no length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not console.is_terminal:
        yield from items
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
    """One line on standard error that is worth reading also in a log: a warning, a fallback, a choice."""
    console.print(message, highlight=False, markup=False, emoji=False, soft_wrap=True)
