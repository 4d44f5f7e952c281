"""Joining a job: the processes that torchrun started find each other, compare what they are, and end together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

from lowbit.distributed.world import ONE, World, here, launched, within
from lowbit.errors import LowbitError

TIMEOUT = "LOWBIT_TIMEOUT"  # seconds until a process that does not answer counts as lost
SECONDS = 1800.0
_joined = count()
_own_group = False  # whether the process group, if there is one, was made here
_unreached = False  # whether this process has looked for the others in vain
_first_error: bool | None = None  # whether this process's error is the first one of the job; None: it has none yet
_store: Any = None  # of the job that was joined last; it outlives the job, so that errors can be told once


def seconds() -> float:
    """The timeout of exchanges between processes."""
    text = os.environ.get(TIMEOUT, str(SECONDS))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e7:
        raise LowbitError(f"{TIMEOUT}={text} is set; give a number of seconds above 0, or unset it")
    return value


@contextmanager
def joined() -> Iterator[World]:
    """Within the context, this process and those that were launched with it share their work.

    The first one prints; progress and notes of the others are not shown. A process that was started alone, or is in
    a job already, goes on as it is.
    """
    world = launched()
    if world.size == 1 or here().size > 1:
        yield here()
        return
    from lowbit.progress import console

    quiet = console.quiet
    console.quiet = quiet or not world.first
    try:
        _join(world)
        try:
            with within(world):
                yield world
        except BaseException:
            reports()  # before the others learn of it, whose errors are consequences
            _abandon()
            raise
        _leave()
    finally:
        console.quiet = quiet


def _join(world: World) -> None:
    global _first_error, _own_group, _store, _unreached
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized() and _own_group:
        _abandon()  # an error has kept the job before this one from ending
    if dist.is_initialized():
        raise LowbitError(
            "torch.distributed is initialized by the program that calls lowbit: let lowbit do it, or call "
            "destroy_process_group() before"
        )
    timeout = timedelta(seconds=seconds())
    try:
        if not world.first:
            _reach(timeout.total_seconds())
        store, rank, size = next(iter(rendezvous("env://", world.rank, world.size, timeout=timeout)))
        # One store serves all jobs of a launch, and every job starts with keys of its own.
        _store = PrefixStore(f"lowbit-{next(_joined)}", store)
        _first_error = None
        dist.init_process_group("gloo", store=_store, rank=rank, world_size=size, timeout=timeout)
        _own_group = True
    except (RuntimeError, OSError, ValueError) as error:  # the latter two: no such address, no such port
        _unreached = True
        raise LowbitError(
            f"process {world.rank} of {world.size} cannot reach the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0][:120]}): see that all of them were started"
        ) from error


def _reach(limit: float) -> None:
    """Wait until something listens where the processes meet; an ``OSError`` if nothing does in ``limit`` seconds.

    The rendezvous of torch 2.13 waits too, but for more than twice the time that it is given.
    """
    until = time.monotonic() + limit
    while True:
        left = until - time.monotonic()
        try:
            place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            socket.create_connection(place, timeout=max(left, 0.1)).close()
            return
        except OSError:
            if left <= 0:
                raise
        time.sleep(0.1)


def _leave() -> None:
    """End the job, once every process has come so far."""
    from lowbit.distributed.exchange import wait

    try:
        with within(launched()):
            wait()
    finally:
        _abandon()


def _abandon() -> None:
    """Leave the job whatever the others do: they may be anywhere, and learn of it in their next exchange.

    What follows in the same program may join another job. A group that cannot be ended now is ended by the next one.
    """
    global _own_group
    import torch.distributed as dist

    with suppress(RuntimeError):  # of connections that are gone; the error that is on its way says more
        dist.destroy_process_group()
        _own_group = False


def have_met() -> bool:
    """Whether the processes of this launch have found each other."""
    return _store is not None


def reports() -> bool:
    """Whether this process is to print its error: the first of a job that has one; the others are consequences.

    A process that has not reached the others speaks for itself: it may be the only one that is left.
    """
    global _first_error
    if launched().size == 1 or _unreached:
        return True
    if _store is None:  # the command did not come so far in any of them
        return launched().first
    if _first_error is None:
        try:
            _first_error = int(_store.add("errors", 1)) == 1
        except RuntimeError:  # the launcher, which has the store, is gone
            _first_error = True
    return _first_error


def agree(facts: Mapping[str, Any]) -> None:
    """Refuse a job whose processes differ.

    Args:
        facts: plain data by name, such as versions and the request; names that come first are reported first.

    Raises:
        LowbitError: names the process, the fact and both values.
    """
    if here() == ONE:
        return
    from lowbit.distributed.exchange import from_everyone

    everyones = from_everyone(dict(facts))
    for rank, others in enumerate(everyones):
        for name in {**everyones[0], **others}:
            if (first := everyones[0].get(name)) != (other := others.get(name)):
                raise LowbitError(
                    f"process {rank} has {name} {str(other)[:80]}, process 0 has {str(first)[:80]}: start all "
                    "processes with the same command, model and installed versions"
                )
