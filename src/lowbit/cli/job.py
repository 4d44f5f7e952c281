"""The command in each of the processes that torchrun started: one of them prints, and one of them tells an error."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lowbit.distributed.job import reports
from lowbit.distributed.world import World, launched
from lowbit.errors import LowbitError
from lowbit.progress import console

SHARED = ("quantize", "evaluate", "compare")


_ended: list[int] = []  # signals by which the launcher has stopped this process


def ended() -> bool:
    """Whether the launcher stops this process, as it does when another one has ended."""
    return bool(_ended)


def check_command(arguments: Sequence[str]) -> None:
    """Refuse several processes for a command that they do not share."""
    world = launched()
    if world.size > 1 and arguments and not arguments[0].startswith("-") and arguments[0] not in SHARED:
        raise LowbitError(
            f"{world.size} processes were started for 'lowbit {arguments[0]}', which one does alone: start it "
            "without torchrun"
        )


def told() -> bool:
    """Whether this process prints its error; from here on it prints, if nothing else did."""
    if not reports():
        return False
    console.quiet = False
    return True


def in_job(world: World, run: Callable[[], int]) -> int:
    """Run a command in one process of a job; what it returns is the exit code.

    A process with an error ends at once: the others would wait for it in vain until its connections close.
    """

    def end(number: int, frame: Any) -> None:
        _ended.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    if not world.first:
        console.quiet = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    code = run()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
