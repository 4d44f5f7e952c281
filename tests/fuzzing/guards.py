"""Limits around what is tried: time, memory, and what it may print."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
CPU_SECONDS, WALL_SECONDS = 10.0, 60.0
ADDRESS_SPACE = 3 << 30  # bytes beyond those that the process has
RESIDENT = 300 * MIB  # bytes that one mutation may add to the peak


class Hang(BaseException):
    """Out of time. Not an ``Exception``, so that no handler in between takes it for an error of the model's."""


@contextmanager
def time_limit(cpu: float = CPU_SECONDS, wall: float = WALL_SECONDS) -> Iterator[None]:
    """Raise ``Hang`` in what takes longer; again each second, since callbacks swallow exceptions.

    Two clocks: a busy machine must not make a hang of what is slow, and what waits for input takes no CPU time.
    """

    def stop(number: int, frame: Any) -> None:
        raise Hang

    clocks = ((signal.ITIMER_PROF, signal.SIGPROF, cpu), (signal.ITIMER_REAL, signal.SIGALRM, wall))
    previous = [signal.signal(number, stop) for _, number, _ in clocks]
    for clock, _, seconds in clocks:
        signal.setitimer(clock, seconds, 1.0)
    try:
        yield
    finally:
        for (clock, number, _), handler in zip(clocks, previous, strict=True):
            signal.setitimer(clock, 0)
            signal.signal(number, handler)


@contextmanager
def memory_limit(more: int = ADDRESS_SPACE) -> Iterator[None]:
    """Let allocations fail that would take more than ``more`` bytes of address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def restart_peak() -> int:
    """Forget the peak of resident memory; the resident memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak() -> int:
    """Peak resident memory since ``restart_peak``, in bytes."""
    return _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@dataclass
class Printed:
    """What was written to standard output and error, from Python and from native code."""

    text: str = ""

    @property
    def lines(self) -> int:
        """Lines; a progress bar that overwrites itself is one."""
        return len(self.text.splitlines())


@contextmanager
def captured() -> Iterator[Printed]:
    """Catch what is printed, also by native code that writes to the file descriptors."""
    printed = Printed()
    sys.stdout.flush()
    sys.stderr.flush()
    saved, streams = [os.dup(1), os.dup(2)], (sys.stdout, sys.stderr)
    with tempfile.TemporaryFile("w+", errors="replace", buffering=1) as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            sys.stdout = sys.stderr = file
            yield printed
        finally:
            sys.stdout, sys.stderr = streams
            for number, own in zip((1, 2), saved, strict=True):
                os.dup2(own, number)
                os.close(own)
            file.flush()
            file.seek(0)
            printed.text = file.read(10 * MIB)


def guarded(function: Callable[[], Any]) -> tuple[Any, BaseException | None, Printed, int]:
    """Run a function within all limits: its result, what it raised, what it printed, and the memory it added."""
    result, error, before = None, None, restart_peak()
    with captured() as printed:
        try:
            with memory_limit(), time_limit():
                result = function()
        except KeyboardInterrupt:
            raise
        except BaseException as raised:  # native code panics with classes of its own
            error = raised
    return result, error, printed, peak() - before
