"""Which of a job's processes this one is; nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lowbit.errors import LowbitError

# What torchrun, or another launcher that follows it, sets for each process.
NEEDED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes of a job, and this one.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0


ONE = World()
_here = ONE


def here() -> World:
    """The processes that share the present work; one, unless a job is joined."""
    return _here


@contextmanager
def within(world: World) -> Iterator[World]:
    """Within the context the processes of ``world`` share the work.

    With ``ONE``, this process does something that the others do not: what is shared otherwise, it computes alone.
    """
    global _here
    before, _here = _here, world
    try:
        yield world
    finally:
        _here = before


def launched(environment: Mapping[str, str] = os.environ) -> World:
    """The processes that a launcher has started, by the environment.

    >>> launched({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    World(rank=1, size=2)
    >>> launched({"WORLD_SIZE": "2"})  # of something else
    World(rank=0, size=1)
    """
    if not all(name in environment for name in NEEDED):
        return ONE
    try:
        world = World(int(environment["RANK"]), int(environment["WORLD_SIZE"]))
    except ValueError:
        world = World(0, 0)
    if not 0 <= world.rank < world.size:
        raise LowbitError(
            f"RANK={environment['RANK']} and WORLD_SIZE={environment['WORLD_SIZE']} are set; a rank is a number from "
            "0 to below the size: start the command with torchrun, or unset both"
        )
    return world
