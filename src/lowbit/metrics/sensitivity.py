"""What one change in one block, and nothing else, does to the next-token distributions of a model.

The float model runs once. At each block, every change to that block makes a stream of hidden states of its own,
which goes on through the float blocks behind, all streams side by side: each block is read once, whatever the
number of changes, and a change costs the blocks behind it and the head. Where the streams would not fit into
``HELD_BYTES``, the blocks are gone through again for the rest of them.

Rejected: a whole forward pass for each change (twice the work, and each would read the whole model).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.metrics.kl import LOGIT_BYTES, Stream
from lowbit.progress import track

HELD_BYTES = 1 << 30  # hidden states of all streams together
_FAR = 60.0  # in nats; float32 ends at exp(88)


@torch.no_grad()
def divergences_alone(
    exact: Stream, counts: Sequence[int], changed: Callable[[int, Tensor], Iterator[Tensor]], ids: Tensor
) -> list[list[float]]:
    """Mean over tokens of ``KL(p || q)`` in nats, ``[block][change]``; ``q`` is ``p``'s model with that one change.

    Args:
        exact: the float model.
        counts: how many changes each block has.
        changed: ``(block, x)`` gives, in turn, that block's output for ``x`` under each of its changes.
        ids: ``(windows, length)``; a window's last position predicts nothing and counts nowhere.
    """
    x = exact.enter(ids)
    most = max(1, HELD_BYTES // (x.numel() * x.element_size()))
    found: list[list[float]] = []
    for first, stop in _spans(counts, most):
        streams: list[Tensor] = []
        before = x
        for index in track(range(first, exact.blocks), f"blocks {first} to {stop - 1}, each alone"):
            fresh = list(changed(index, before)) if index < stop else []
            *streams, before = exact.through(index, [*streams, before])
            streams += fresh
            if index == stop - 1:
                x = before
        flat = iter(_divergences(exact, ids, before, streams))
        found += [[next(flat) for _ in range(count)] for count in counts[first:stop]]
    return found


def _spans(counts: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Consecutive blocks ``(first, stop)`` with ``most`` changes together, or one block with more."""
    first = held = 0
    for at, count in enumerate(counts):
        if at > first and held + count > most:
            yield first, at
            first, held = at, 0
        held += count
    if first < len(counts):
        yield first, len(counts)


def _divergences(exact: Stream, ids: Tensor, hidden: Tensor, streams: Sequence[Tensor]) -> list[float]:
    totals = [0.0] * len(streams)
    last = ids.shape[1] - 1
    step = max(1, LOGIT_BYTES // (8 * exact.scores(ids[:1], hidden[:1], 0, 1).shape[-1]))
    for window in range(len(ids)):
        some = slice(window, window + 1)
        for start in range(0, last, step):
            stop = min(start + step, last)
            p = exact.scores(ids[some], hidden[some], start, stop).float()
            for at, stream in enumerate(track(streams, "distributions")):
                totals[at] += float(divergence(p, exact.scores(ids[some], stream[some], start, stop).float()).sum())
    if not all(map(math.isfinite, totals)):
        raise LowbitError("a block's output is NaN or infinite: try --dtype float32, or quantize with another recipe")
    return [total / (len(ids) * last) for total in totals]


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """``KL(softmax(exact) || softmax(other))`` over the last axis, in float64, from logits in float32.

    With ``d = exact - other``, shifted so that ``sum p d = 0``, it is ``log(1 + sum p (exp(-d) - 1))``: no difference
    of large numbers is left, so that float32 keeps small divergences, and a vocabulary costs no float64.

    >>> logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    >>> round(float(divergence(logits[0], logits[1])), 6)
    0.143841
    """
    log_p = exact.log_softmax(-1)
    p = log_p.exp()
    apart = exact - other
    apart = apart - apart.mean(-1, keepdim=True)  # a large shift would meet the rounding of sum p = 1
    apart = apart - (p * apart).sum(-1, keepdim=True)
    far = torch.logsumexp(log_p - apart, -1)  # where exp would overflow; there nothing small is asked for
    near = (p * torch.expm1(-apart.clamp(min=-_FAR))).sum(-1).double().log1p()
    return torch.where((apart < -_FAR).any(-1), far.double(), near)
