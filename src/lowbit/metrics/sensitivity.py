"""Sensitivity of next-token distributions to single changes of single blocks.

The float model runs once. At each block, every change to that block yields hidden states that continue through the
remaining float blocks, all changes side by side: each block is read once, whatever the number of changes, and a
change costs the blocks after it and the head. Where the hidden states exceed ``HELD_BYTES``, the blocks are run again
for the remaining changes.

Rejected: a full forward pass for each change (twice the work, and each reads the whole model).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.metrics.kl import LOGIT_BYTES, Stream
from lowbit.progress import track

HELD_BYTES = 1 << 30  # of all hidden states together
_FAR = 60.0  # in nats; float32 overflows at exp(88)


@torch.no_grad()
def divergences_alone(
    exact: Stream, counts: Sequence[int], changed: Callable[[int, Tensor], Iterator[Tensor]], ids: Tensor
) -> list[list[float]]:
    """Mean over tokens of ``KL(p || q)`` in nats, ``[block][change]``; ``q`` is the model with that change only.

    Args:
        exact: the float model.
        counts: number of changes of each block.
        changed: ``(block, x)`` yields the block's output for ``x`` under each of its changes.
        ids: ``(windows, length)``; a window's last position has no target token and is excluded.
    """
    x = exact.enter(ids)
    most = max(1, HELD_BYTES // (x.numel() * x.element_size()))
    divergences: list[list[float]] = []
    for first, stop in _spans(counts, most):
        states: list[Tensor] = []
        before = x
        for index in track(range(first, exact.blocks), f"blocks {first} to {stop - 1}, each alone"):
            new_states = list(changed(index, before)) if index < stop else []
            *states, before = exact.through(index, [*states, before])
            states += new_states
            if index == stop - 1:
                x = before
        flat = iter(_divergences(exact, ids, before, states))
        divergences += [[next(flat) for _ in range(count)] for count in counts[first:stop]]
    return divergences


def _spans(counts: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of blocks ``(first, stop)`` with at most ``most`` changes in total, or one block with more."""
    first = total = 0
    for block, count in enumerate(counts):
        if block > first and total + count > most:
            yield first, block
            first, total = block, 0
        total += count
    if first < len(counts):
        yield first, len(counts)


def _divergences(exact: Stream, ids: Tensor, hidden: Tensor, states: Sequence[Tensor]) -> list[float]:
    totals = [0.0] * len(states)
    last = ids.shape[1] - 1
    step = max(1, LOGIT_BYTES // (8 * exact.scores(ids[:1], hidden[:1], 0, 1).shape[-1]))
    for window in range(len(ids)):
        row = slice(window, window + 1)
        for start in range(0, last, step):
            stop = min(start + step, last)
            p = exact.scores(ids[row], hidden[row], start, stop).float()
            for change, state in enumerate(track(states, "distributions")):
                totals[change] += float(divergence(p, exact.scores(ids[row], state[row], start, stop).float()).sum())
    if not all(map(math.isfinite, totals)):
        raise LowbitError("a block's output is NaN or infinite: try --dtype float32, or quantize with another recipe")
    return [total / (len(ids) * last) for total in totals]


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """``KL(softmax(exact) || softmax(other))`` over the last axis, in float64, from logits in float32.

    With ``d = exact - other``, shifted so that ``sum p d = 0``, it is ``log(1 + sum p (exp(-d) - 1))``: without
    differences of large numbers, float32 resolves small divergences, and no float64 copy of the logits is needed.

    >>> logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    >>> round(float(divergence(logits[0], logits[1])), 6)
    0.143841
    """
    log_p = exact.log_softmax(-1)
    p = log_p.exp()
    difference = exact - other
    # Centred first: a large shift would amplify the rounding error of sum p = 1.
    difference = difference - difference.mean(-1, keepdim=True)
    difference = difference - (p * difference).sum(-1, keepdim=True)
    far = torch.logsumexp(log_p - difference, -1)  # where exp would overflow; the divergence is large there
    near = (p * torch.expm1(-difference.clamp(min=-_FAR))).sum(-1).double().log1p()
    return torch.where((difference < -_FAR).any(-1), far.double(), near)
