"""The command in each of the processes that torchrun started: one of them prints, and one of them tells an error."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from lowbit.distributed.errors import Lost
from lowbit.distributed.job import have_met, reports
from lowbit.distributed.world import World, launched
from lowbit.errors import LowbitError
from lowbit.progress import console, say

PATIENCE = 30.0  # seconds in which the first process finds what another has found
SHARED = ("quantize", "evaluate", "compare")


_telling: list[bool] = []  # that this process has come to telling its error
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
    """Whether this process prints its error; from here on it prints, if nothing else did.

    The launcher's signal to end, which comes when another process has ended, no longer matters then: it would be
    told as a second reason. Before the processes have met, all of them find what is wrong with a command, and the
    first one tells it. Another does not end before that one, which would then be ended unheard; what it alone has
    found it tells itself.
    """
    _telling.append(True)
    if launched().size > 1:
        signal.signal(signal.SIGTERM, lambda number, frame: _ended.append(number))
    if not reports() and (have_met() or _ended_within(PATIENCE)):
        return False
    console.quiet = False
    return True


def _ended_within(seconds: float) -> bool:
    """Wait for the launcher's signal."""
    until = time.monotonic() + seconds
    while not _ended and time.monotonic() < until:
        time.sleep(0.05)
    return bool(_ended)


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
    try:
        code = run()
    except KeyboardInterrupt:  # it came between an error and its telling
        code = 2
        if not _telling and told():
            say(f"lowbit: error: {Lost()}")
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
