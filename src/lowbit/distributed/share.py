"""Work that the processes of a job divide among them: each does some of it and gets the results of all.

What is divided must not depend on how: an item's result has the same bits whichever process computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lowbit.distributed.exchange import from_everyone
from lowbit.distributed.tree import own_part
from lowbit.distributed.world import ONE, here, within

T = TypeVar("T")
# Rows; a multiple of what vector instructions take at once, so that a row's arithmetic is that of the whole.
TILE = 64


def own_items(items: Sequence[T]) -> Sequence[T]:
    """Which consecutive items this process takes."""
    own = own_part(len(items), here().rank, here().size)
    return items[own.start : own.stop]


def each(items: Sequence[T], compute: Callable[[T], Any]) -> list[Any]:
    """``compute`` of every item, in order, each computed by one process.

    Args:
        items: the same in all processes.
        compute: plain data of an item; a function of the item alone. What it shares otherwise, it computes alone.

    >>> each([1, 2, 3], lambda item: item * item)
    [1, 4, 9]
    """
    own = own_items(items)
    with within(ONE):
        found = [compute(item) for item in own]
    return [value for process in from_everyone(found) for value in process]


def tiles(rows: int) -> list[range]:
    """Rows in tiles of ``TILE``, the last one with the remainder; each process takes whole tiles.

    >>> tiles(200)
    [range(0, 64), range(64, 128), range(128, 200)]
    >>> tiles(20)
    [range(0, 20)]
    """
    starts = [TILE * tile for tile in range(max(1, rows // TILE))]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], rows], strict=True)]


def parts_of_rows(rows: int) -> list[range]:
    """The rows of each process: consecutive tiles, some of which may be none.

    >>> parts_of_rows(200)
    [range(0, 200)]
    """
    whole, size = tiles(rows), here().size
    owned = [own_part(len(whole), rank, size) for rank in range(size)]
    return [range(whole[own.start].start, whole[own.stop - 1].stop) if own else range(0) for own in owned]
