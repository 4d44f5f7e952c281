"""Host-offloaded activations with prefetch.

Calibration hidden states ``(sequences, length, hidden)`` grow with the number of sequences; a GPU's memory does not.
On a CUDA device, hidden states are stored in pinned host memory and only the sequences in use are on the device; the
next ones are copied meanwhile on a separate CUDA stream. On other devices, hidden states are stored on the compute
device, nothing is copied, and the functions here reduce to ``split``, ``cat`` and indexing.

The allocator must not reuse a tensor that one CUDA stream writes and another reads too early: device tensors are
recorded on the stream that reads them, and torch's host allocator keeps pinned sources until their copies are done.
It rounds a pinned buffer up to a power of two bytes and caches it for the next buffer of that size.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lowbit.distributed.world import here
from lowbit.models.shard import Shard, States

READY = 2  # prefetched sets of rows held at once: those of the current step and of the next


def storage_device(device: torch.device | str) -> torch.device:
    """The device that stores hidden states for computation on ``device``: the host for CUDA, else the device itself.

    >>> storage_device("cuda:1"), storage_device("mps")
    (device(type='cpu'), device(type='mps'))
    """
    device = torch.device(device)
    return torch.device("cpu") if device.type == "cuda" else device


def _is_offloaded(x: Tensor, device: torch.device) -> bool:
    """Whether ``x`` is stored elsewhere and copied to ``device`` batch by batch."""
    return device.type == "cuda" and x.device.type != "cuda"


@cache
def _copy_stream(device: torch.device, direction: str) -> Any:
    """The CUDA stream for copies to (``in``) or from (``out``) a device; shared, so that its memory is reused."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]


def _with_index(device: torch.device) -> torch.device:
    """``device`` with an index: ``cuda`` becomes the current device, such as ``cuda:0``."""
    has_index = device.index is not None or device.type != "cuda"
    return device if has_index else torch.device("cuda", torch.cuda.current_device())


def batches(x: Tensor, batch: int, device: torch.device) -> Iterator[Tensor]:
    """``x`` ``(sequences, ...)`` in batches of ``batch`` sequences on ``device``, prefetched by one batch.

    At most three batches are on the device: the current one, the previous one (possibly unfinished) and the next.
    """
    pieces = x.split(batch)
    if not _is_offloaded(x, device):
        yield from pieces
        return
    device = _with_index(device)
    compute = torch.cuda.current_stream(device)
    upcoming = _start_copy(partial(_copy, pieces[0], device), device)
    previous: Any = None
    for index in range(len(pieces)):
        current = upcoming
        if index + 1 < len(pieces):
            upcoming = _start_copy(partial(_copy, pieces[index + 1], device), device)
        yield _wait_for_copy(*current, device)[0]
        # The host may run far ahead of the device; without this, everything might be copied before it is used.
        done = compute.record_event()
        if previous is not None:
            previous.synchronize()
        previous = done


def _copy(x: Tensor, device: torch.device) -> list[Tensor]:
    return [x.to(device, non_blocking=True)]


def _start_copy(copy: Callable[[], list[Tensor]], device: torch.device) -> tuple[list[Tensor], Any]:
    """Run ``copy`` on the copy stream; returns its tensors and the event after it."""
    stream = _copy_stream(device, "in")
    with torch.cuda.stream(stream):
        return copy(), stream.record_event()


def _wait_for_copy(copies: list[Tensor], event: Any, device: torch.device) -> list[Tensor]:
    """The copies, for use on the current stream, which waits for them; the host does not."""
    compute = torch.cuda.current_stream(device)
    compute.wait_event(event)
    for tensor in copies:
        tensor.record_stream(compute)
    return copies


def concatenate(pieces: Iterable[Tensor], sequences: int, where: torch.device) -> Tensor:
    """``pieces`` ``(n, ...)``, produced one after the other, as one tensor of ``sequences`` on ``where``.

    Each piece is copied into the result at once, so that nothing is held twice. Pieces on a GPU whose result is
    stored on the host are copied into a pinned buffer while the next piece is computed. Without gradients.
    """
    out: Tensor | None = None
    filled = 0
    stream: Any = None
    previous: Any = None
    for piece in pieces:
        to_host = piece.device.type == "cuda" and where.type != "cuda"
        if out is None:
            device = where if to_host else piece.device
            out = torch.empty((sequences, *piece.shape[1:]), dtype=piece.dtype, device=device, pin_memory=to_host)
            stream = _copy_stream(piece.device, "out") if to_host else None
        target = out[filled : filled + len(piece)]
        filled += len(piece)
        if not to_host:
            target.copy_(piece)
            continue
        stream.wait_stream(torch.cuda.current_stream(piece.device))
        with torch.cuda.stream(stream):
            target.copy_(piece, non_blocking=True)
            done = stream.record_event()
        piece.record_stream(stream)
        # A piece may be computed faster than it is copied; without this, all of them might pile up on the device.
        if previous is not None:
            previous.synchronize()
        previous = done
    assert out is not None
    assert filled == sequences, f"{filled} of {sequences} sequences given"
    if stream is not None:
        stream.synchronize()
    return out


def select_sequences(x: States, chosen: Tensor) -> States:
    """The sequences ``chosen`` of hidden states ``x`` as a new tensor, pinned if ``x`` is, or as a shard of them."""
    if isinstance(x, Shard):
        return x.select(chosen)
    out = x[chosen.to(x.device)]
    return out.pin_memory() if x.is_pinned() else out


class Rows:
    """Selected sequences of several tensors on a device, prefetched where they are stored elsewhere.

    >>> rows = Rows(torch.device("cpu"), torch.tensor([[1.0], [2.0], [3.0]]))
    >>> rows(torch.tensor([2, 0]))[0].tolist()
    [[3.0], [1.0]]
    """

    def __init__(self, device: torch.device, *tensors: States) -> None:
        """``tensors``: each ``(sequences, ...)``, on the device or on its ``storage_device``, or a shard."""
        self.shards = [tensor for tensor in tensors if isinstance(tensor, Shard)]
        self._delivered: list[Tensor] = []
        self._places: dict[int, int] = {}
        self.all = tensors
        self.tensors = [tensor for tensor in tensors if not isinstance(tensor, Shard)]
        self.device = _with_index(device) if device.type == "cuda" else device
        self._offloaded = [tensor for tensor in self.tensors if _is_offloaded(tensor, self.device)]
        self._ready: dict[tuple[int, ...], tuple[list[Tensor], Any]] = {}

    def share(self, wanted: Sequence[Tensor]) -> None:
        """Fetch what each process calls for next, of shards; called by all of them.

        Args:
            wanted: indices of sequences, for each process.
        """
        if self.shards:
            self._delivered = [shard.delivered(wanted) for shard in self.shards]
            mine = wanted[self.shards[0].rank].tolist()
            self._places = {sequence: place for place, sequence in enumerate(mine)}

    def everywhere(self, chosen: Tensor) -> None:
        """``share`` where each process calls for the same sequences."""
        self.share([chosen] * here().size)

    def prepare(self, chosen: Tensor) -> None:
        """Prefetch the sequences ``chosen`` (indices, on the host); the oldest beyond ``READY`` sets are dropped."""
        key = tuple(chosen.tolist())
        if not self._offloaded or key in self._ready:
            return
        while len(self._ready) >= READY:
            del self._ready[next(iter(self._ready))]
        self._ready[key] = _start_copy(partial(self._copy_rows, key), self.device)

    def __call__(self, chosen: Tensor) -> list[Tensor]:
        """The sequences ``chosen`` of each tensor, in order: shared, prefetched, or copied now."""
        if self.shards:
            places = [self._places[sequence] for sequence in chosen.tolist()]
            found = iter(self._delivered)
            return [next(found)[places] if isinstance(own, Shard) else own[chosen] for own in self.all]
        if self.device.type != "cuda":
            return [tensor[chosen] for tensor in self.tensors]
        key = tuple(chosen.tolist())
        copied: Iterator[Tensor] = iter(())
        if self._offloaded:
            self.prepare(chosen)
            copied = iter(_wait_for_copy(*self._ready.pop(key), self.device))
        # An index tensor on the host would make the host wait for the device.
        return [
            next(copied) if _is_offloaded(tensor, self.device) else torch.stack([tensor[i] for i in key])
            for tensor in self.tensors
        ]

    def _copy_rows(self, key: Sequence[int]) -> list[Tensor]:
        """Copy row by row: a gather on the host would take an extra pass and an extra pinned buffer."""
        out = []
        for tensor in self._offloaded:
            rows = torch.empty((len(key), *tensor.shape[1:]), dtype=tensor.dtype, device=self.device)
            for row, index in enumerate(key):
                rows[row].copy_(tensor[index], non_blocking=True)
            out.append(rows)
        return out


def release_free_memory() -> None:
    """Give free memory of the C heap back to the system, where that is glibc's; elsewhere nothing happens.

    Freed blocks below a longer-lived one stay with the process. A run keeps a little of each layer, such as the
    errors of its linears, and would hold ever more of such blocks.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
