"""What the processes of a job tell each other. Each function is called by all of them, at the same place.

Values travel as JSON and as tensors, never pickled. ``torch.distributed`` is imported where there are several
processes, and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit.distributed.errors import Lost
from lowbit.distributed.tree import Node, Tree
from lowbit.distributed.world import ONE, here, within

T = TypeVar("T")


@contextmanager
def _talking() -> Iterator[Any]:
    """``torch.distributed``, with its errors as ``Lost``."""
    import torch.distributed as dist

    try:
        yield dist
    except RuntimeError as error:  # all of its backends raise this class, or one below it
        raise Lost from error


def wait() -> None:
    """Return when every process is here."""
    if here().size > 1:
        with _talking() as dist:
            dist.barrier()


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, which the others do not call; plain data."""
    if here().size == 1:
        return make()
    made: Any = None
    if here().first:
        with within(ONE):
            made = make()
    return _from(0, made)


def by_first(do: Callable[[], object]) -> None:
    """The first process does something by itself; the others wait until it is done."""

    def done() -> None:
        do()

    from_first(done)


def first_then_others(make: Callable[[], T]) -> T:
    """What each process makes by itself, the first one before all others."""
    if here().size == 1:
        return make()
    if not here().first:
        wait()
    with within(ONE):
        made = make()
    if here().first:
        wait()
    wait()
    return made


def from_everyone(value: Any) -> list[Any]:
    """What each process gives, in order; plain data."""
    if here().size == 1:
        return [value]
    return [_from(source, value) for source in range(here().size)]


def fill(out: Tensor, parts: Sequence[range]) -> None:
    """Fill ``out`` ``(rows, ...)``: the rows ``parts[rank]`` come from process ``rank``, which has them there."""
    for source, part in enumerate(parts):
        if part and here().size > 1:
            _send(out[part.start : part.stop], source)


def delivered(own: Tensor, owned: Sequence[range], wanted: Sequence[Sequence[int]]) -> Tensor:
    """The rows that this process wants of a tensor whose rows are divided.

    Args:
        own: this process's rows ``(rows, ...)``; without any, it has the shape of a row still.
        owned: the rows of each process, by number among all.
        wanted: the numbers that each process wants.
    """
    me = here().rank
    out = own.new_empty((len(wanted[me]), *own.shape[1:]))
    # Pairs of processes take their turns in one order, so that none waits for another in a circle.
    for source, mine in enumerate(owned):
        for target, rows in enumerate(wanted):
            places = [place for place, row in enumerate(rows) if row in mine]
            if not places or me not in (source, target):
                continue
            if source == me:
                picked = own[[rows[place] - mine.start for place in places]]
            else:
                picked = own.new_empty((len(places), *own.shape[1:]))
            if source != target:
                _pass_on(picked, source, target)
            if target == me:
                out[places] = picked
    return out


def _pass_on(tensor: Tensor, source: int, target: int) -> None:
    """Send contiguous values from one process to another, in place; called by the two."""
    data = tensor.flatten().view(torch.uint8)
    if not len(data):
        return
    with _talking() as dist:
        if here().rank == source:
            dist.send(data, target)
        else:
            dist.recv(data, source)


def with_tensors(data: Any, tensors: Sequence[Tensor]) -> Iterator[tuple[Any, list[Tensor]]]:
    """Plain data and tensors of each process, in order; its own ones are not copied."""
    if here().size == 1:
        yield data, list(tensors)
        return
    for source in range(here().size):
        own = source == here().rank
        sent = _from(source, [data, _facts(tensors)] if own else None)
        given = list(tensors) if own else [_empty(*fact) for fact in sent[1]]
        _send_all(given, source)
        yield sent[0], given


def total(
    tree: Tree[T], pack: Callable[[T], tuple[Any, list[Tensor]]], unpack: Callable[[Any, list[Tensor]], T]
) -> T | None:
    """The merged value of the leaves of all processes, the same bits in each.

    Args:
        tree: this process's leaves; they are used up.
        pack: a value as plain data and tensors.
        unpack: the value of such a pair.
    """
    if here().size == 1:
        return tree.total()
    whole = Tree(tree.merge)
    for source in range(here().size):
        own = tree.nodes if source == here().rank else []
        packed = [(node, *pack(node.value)) for node in own]
        facts = [[node.start, node.length, data, _facts(tensors)] for node, data, tensors in packed]
        sent = _from(source, facts)
        for at, (start, length, data, shapes) in enumerate(sent):
            tensors = packed[at][2] if packed else [_empty(*fact) for fact in shapes]
            _send_all(tensors, source)
            whole.add(own[at] if packed else Node(start, length, unpack(data, tensors)))
    tree.nodes.clear()
    return whole.total()


def _facts(tensors: Sequence[Tensor]) -> list[tuple[list[int], str]]:
    return [(list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in tensors]


def _empty(shape: Sequence[int], dtype: str) -> Tensor:
    return torch.empty(*shape, dtype=getattr(torch, dtype)) if shape else torch.empty((), dtype=getattr(torch, dtype))


_SMALL = 1 << 20  # bytes; smaller tensors travel together, since each message takes a tenth of a millisecond


def _send_all(tensors: Sequence[Tensor], source: int) -> None:
    """``_send`` for each, the small ones of a dtype as one message."""
    together: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() * tensor.element_size() > _SMALL:
            _send(tensor, source)
        else:
            together.setdefault(tensor.dtype, []).append(tensor)
    for group in together.values():
        flat = torch.cat([tensor.detach().flatten() for tensor in group])
        _send(flat, source)
        if here().rank != source:
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))


def _send(tensor: Tensor, source: int) -> None:
    """Give every process the values that ``tensor`` has in process ``source``, in place."""
    value = tensor.detach()
    whole = value if value.is_contiguous() else value.contiguous()
    if not whole.numel():
        return
    with _talking() as dist:
        dist.broadcast(whole.flatten().view(torch.uint8), source)  # gloo does not know all dtypes
    if whole is not value and here().rank != source:
        value.copy_(whole)


def _from(source: int, value: Any) -> Any:
    """Plain data of process ``source``; the others' ``value`` does not matter."""
    text = json.dumps(value).encode() if here().rank == source else b""
    size = torch.tensor([len(text)])
    _send(size, source)
    data = torch.tensor(list(text), dtype=torch.uint8) if here().rank == source else None
    if data is None:
        data = torch.empty(int(size), dtype=torch.uint8)
    _send(data, source)
    return json.loads(data.numpy().tobytes())
