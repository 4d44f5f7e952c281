"""Perplexity by the protocol of the quantization literature.

A text is tokenized as a whole and split into consecutive, non-overlapping windows of equal length; each window is
scored without context from the previous one, and every token except a window's first counts. The result is ``exp``
of the mean negative log-likelihood. It depends on the window length: only results at one length are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lowbit.errors import LowbitError


def negative_log_likelihood(ids: Tensor, logits: Tensor) -> Tensor:
    """Sum over each window of ``-log p(token | tokens before it)``, ``(windows,)`` in float64.

    ``ids`` is ``(windows, length)``, ``logits`` ``(windows, length, vocabulary)``; ``length - 1`` tokens count.
    """
    sums = []
    for tokens, scores in zip(ids, logits, strict=True):  # by window: a float32 copy of all logits would be large
        losses = torch.nn.functional.cross_entropy(scores[:-1].float(), tokens[1:], reduction="none")
        sums.append(losses.double().sum())
    return torch.stack(sums)


def perplexity(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Perplexity over ``(ids, logits)`` batches, ``(windows, length)`` and ``(windows, length, vocabulary)``.

    A uniform distribution over V tokens has perplexity V:

    >>> round(perplexity([(torch.tensor([[0, 1, 2]]), torch.zeros(1, 3, 8))]), 6)
    8.0
    """
    total, count = 0.0, 0
    for ids, logits in batches:
        total += float(negative_log_likelihood(ids, logits).sum())
        count += ids.shape[0] * (ids.shape[1] - 1)
    if count == 0:
        raise LowbitError("perplexity of no tokens: give at least one window of two tokens")
    mean = total / count
    if math.isnan(mean):
        raise LowbitError(
            "the model's logits are NaN: its weights or its 16-bit arithmetic overflow; try --dtype float32"
        )
    return math.exp(mean) if mean < 700 else math.inf
