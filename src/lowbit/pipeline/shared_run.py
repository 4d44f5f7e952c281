"""One run by several processes: the first has the folder and writes, all see what it wrote and hold the same bits."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from lowbit.distributed.exchange import from_everyone, from_first
from lowbit.distributed.world import here
from lowbit.errors import LowbitError
from lowbit.models.block import Block
from lowbit.runs.folder import State, claimed
from lowbit.runs.manifest import Identity

VISIBLE = 60.0  # seconds until a file that one process wrote shows on another machine


@contextmanager
def claimed_by_first(out: Path, identity: Identity) -> Iterator[State]:
    """``claimed`` in the first process; all of them get the state that it sees."""
    if here().size == 1:
        with claimed(out, identity) as state:
            yield state
    elif here().first:
        with claimed(out, identity) as state:
            yield from_first(lambda: state)
    else:
        yield from_first(lambda: "new")


def exist(*paths: Path) -> bool:
    """Whether all of these files are there, as the first process sees it."""
    return from_first(lambda: all(path.exists() for path in paths))


def see(*paths: Path) -> None:
    """Wait until this process sees files that the first one wrote.

    Raises:
        LowbitError: it does not: the folder is not on a file system that they share.
    """
    if here().first:
        return
    until = time.monotonic() + VISIBLE
    for path in paths:
        while not path.exists():
            if time.monotonic() > until:
                raise LowbitError(
                    f"process {here().rank} does not see {path}, which process 0 wrote: --out must be a folder on a "
                    "file system that all machines share"
                )
            with suppress(OSError):
                os.listdir(path.parent)  # makes network file systems look again
            time.sleep(0.05)


def check_same_bits(block: Block) -> None:
    """Refuse to go on if the processes have computed different blocks from the same data."""
    if here().size == 1:
        return
    digests = from_everyone(_digest(block))
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise LowbitError(
                f"block {block.start}: process {rank} computed other bits than process 0 from the same data; their "
                "processors differ: use machines of one kind"
            )


def _digest(block: Block) -> str:
    found = hashlib.sha256()

    def add(name: str, value: Tensor) -> None:
        found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    for name, value in block.params.items():
        add(name, value)
    for name, q in block.qweights.items():
        for key, value in (("codes", q.codes), *zip(q.qparams._fields, q.qparams, strict=True)):
            add(f"{name}.{key}", value)
    for name, op in block.ops.items():
        for key, value in op.to_tensors().items():
            add(f"{name}.{key}", value)
    return found.hexdigest()
