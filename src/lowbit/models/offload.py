"""Activations that wait in host memory while a GPU works on a few sequences of them.

Calibration streams ``(sequences, length, hidden)`` grow with the number of sequences; a GPU's memory does not. Where
a run's device is CUDA, streams live in pinned host memory, and only the sequences at work are on the device: the next
ones are copied on a stream of their own meanwhile. Everywhere else streams live where the work is, nothing is copied,
and the functions here are ``split``, ``cat`` and indexing.

What is copied for one stream of work and made on another must not be reused by the allocator too early: tensors are
recorded on the stream that reads them, and pinned sources are kept by torch's own host allocator until their copies
are done. It rounds a pinned buffer up to a power of two bytes and keeps it for the next one of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

READY = 2  # prepared sets of rows that may wait: those of this step and of the next


def storage_device(device: torch.device | str) -> torch.device:
    """Where streams for work on ``device`` live: the host for CUDA, else the device itself.

    >>> storage_device("cuda:1"), storage_device("mps")
    (device(type='cpu'), device(type='mps'))
    """
    device = torch.device(device)
    return torch.device("cpu") if device.type == "cuda" else device


def _travels(x: Tensor, device: torch.device) -> bool:
    """Whether ``x`` is copied to ``device`` before work, part by part."""
    return device.type == "cuda" and x.device.type != "cuda"


@cache
def _stream(device: torch.device, way: str) -> Any:
    """The stream for copies to (``in``) or from (``out``) a device; one for all, so that memory is used again."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]


def _indexed(device: torch.device) -> torch.device:
    """``cuda`` as ``cuda:0``, or whichever is the current one."""
    whole = device.index is not None or device.type != "cuda"
    return device if whole else torch.device("cuda", torch.cuda.current_device())


def batches(x: Tensor, batch: int, device: torch.device) -> Iterator[Tensor]:
    """``x`` ``(sequences, ...)`` in parts of ``batch`` sequences on ``device``, one part ahead of their use.

    At most three parts are on the device: one that is worked on, one before it that may not be done, one to come.
    """
    pieces = x.split(batch)
    if not _travels(x, device):
        yield from pieces
        return
    device = _indexed(device)
    work = torch.cuda.current_stream(device)
    coming = _sent(partial(_copied, pieces[0], device), device)
    before: Any = None
    for at in range(len(pieces)):
        now = coming
        if at + 1 < len(pieces):
            coming = _sent(partial(_copied, pieces[at + 1], device), device)
        yield _arrived(*now, device)[0]
        # The host may run far ahead of the device; without this, everything might be copied before it is used.
        done = work.record_event()
        if before is not None:
            before.synchronize()
        before = done


def _copied(x: Tensor, device: torch.device) -> list[Tensor]:
    return [x.to(device, non_blocking=True)]


def _sent(copy: Callable[[], list[Tensor]], device: torch.device) -> tuple[list[Tensor], Any]:
    """What ``copy`` starts on the stream for copies, and the event after it."""
    side = _stream(device, "in")
    with torch.cuda.stream(side):
        return copy(), side.record_event()


def _arrived(copies: list[Tensor], event: Any, device: torch.device) -> list[Tensor]:
    """The copies, for use on the present stream: it waits for them, the host does not."""
    work = torch.cuda.current_stream(device)
    work.wait_event(event)
    for one in copies:
        one.record_stream(work)
    return copies


def concatenate(pieces: Iterable[Tensor], sequences: int, where: torch.device) -> Tensor:
    """``pieces`` ``(some, ...)``, made one after the other, as one tensor of ``sequences`` on ``where``.

    Each goes into its place at once, so that nothing is held twice. Pieces on a GPU that shall live on the host go
    into a pinned buffer while the next piece is made. Without gradients.
    """
    out: Tensor | None = None
    at = 0
    side: Any = None
    before: Any = None
    for piece in pieces:
        far = piece.device.type == "cuda" and where.type != "cuda"
        if out is None:
            place = where if far else piece.device
            out = torch.empty((sequences, *piece.shape[1:]), dtype=piece.dtype, device=place, pin_memory=far)
            side = _stream(piece.device, "out") if far else None
        to = out[at : at + len(piece)]
        at += len(piece)
        if not far:
            to.copy_(piece)
            continue
        side.wait_stream(torch.cuda.current_stream(piece.device))
        with torch.cuda.stream(side):
            to.copy_(piece, non_blocking=True)
            done = side.record_event()
        piece.record_stream(side)
        # A piece may be made faster than it is copied; without this, all of them might wait on the device.
        if before is not None:
            before.synchronize()
        before = done
    assert out is not None
    assert at == sequences, f"{at} of {sequences} sequences came"
    if side is not None:
        side.synchronize()
    return out


def select_sequences(x: Tensor, chosen: Tensor) -> Tensor:
    """The sequences ``chosen`` of a stream as a stream of their own, pinned if it was."""
    out = x[chosen.to(x.device)]
    return out.pin_memory() if x.is_pinned() else out


class Rows:
    """Chosen sequences of several streams on a device, copied ahead of their use where they live elsewhere.

    >>> rows = Rows(torch.device("cpu"), torch.tensor([[1.0], [2.0], [3.0]]))
    >>> rows(torch.tensor([2, 0]))[0].tolist()
    [[3.0], [1.0]]
    """

    def __init__(self, device: torch.device, *streams: Tensor) -> None:
        """``streams``: each ``(sequences, ...)``, on the device or where streams for it live."""
        self.streams = streams
        self.device = _indexed(device) if device.type == "cuda" else device
        self._far = [stream for stream in streams if _travels(stream, self.device)]
        self._ready: dict[tuple[int, ...], tuple[list[Tensor], Any]] = {}

    def prepare(self, chosen: Tensor) -> None:
        """Start to copy the sequences ``chosen`` (indices, on the host); of earlier ones only the last are kept."""
        key = tuple(chosen.tolist())
        if not self._far or key in self._ready:
            return
        while len(self._ready) >= READY:
            del self._ready[next(iter(self._ready))]
        self._ready[key] = _sent(partial(self._picked, key), self.device)

    def __call__(self, chosen: Tensor) -> list[Tensor]:
        """The sequences ``chosen`` of each stream, in their order: what was prepared, or copied now."""
        if self.device.type != "cuda":
            return [stream[chosen] for stream in self.streams]
        key = tuple(chosen.tolist())
        far: Iterator[Tensor] = iter(())
        if self._far:
            self.prepare(chosen)
            far = iter(_arrived(*self._ready.pop(key), self.device))
        # An index tensor on the host would make the host wait for the device.
        return [
            next(far) if _travels(stream, self.device) else torch.stack([stream[i] for i in key])
            for stream in self.streams
        ]

    def _picked(self, key: Sequence[int]) -> list[Tensor]:
        """Row by row: a gather on the host would take a pass, and a pinned buffer, of its own."""
        out = []
        for stream in self._far:
            rows = torch.empty((len(key), *stream.shape[1:]), dtype=stream.dtype, device=self.device)
            for to, index in enumerate(key):
                rows[to].copy_(stream[index], non_blocking=True)
            out.append(rows)
        return out
