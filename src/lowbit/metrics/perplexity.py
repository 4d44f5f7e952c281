"""Perplexity by the protocol of the quantization literature.

A text is split into consecutive, non-overlapping windows of equal length; each window is scored without context from
the previous one, and every token counts that has a token before it and is no special token in front of the window.
The result is ``exp`` of the mean negative log-likelihood. It depends on the window length and on the special tokens:
only results with the same are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lowbit.errors import LowbitError


def negative_log_likelihood(ids: Tensor, logits: Tensor, first: int = 1) -> Tensor:
    """Sum over each window of ``-log p(token | tokens before it)``, ``(windows,)`` in float64.

    ``ids`` is ``(windows, length)``, ``logits`` ``(windows, length, vocabulary)``; tokens from ``first`` on count.
    """
    sums = []
    for tokens, scores in zip(ids, logits, strict=True):  # by window: a float32 copy of all logits would be large
        losses = torch.nn.functional.cross_entropy(scores[first - 1 : -1].float(), tokens[first:], reduction="none")
        sums.append(losses.double().sum())
    return torch.stack(sums)


def scored(ids: Tensor, logits: Tensor, first: int = 1) -> tuple[float, int]:
    """The sum of a batch's negative log-likelihoods, and the number of its scored tokens; see ``perplexity``."""
    total = float(negative_log_likelihood(ids, logits, first).sum())
    return total, ids.shape[0] * (ids.shape[1] - first)


def perplexity(batches: Iterable[tuple[Tensor, Tensor]], first: int = 1) -> float:
    """Perplexity over ``(ids, logits)`` batches, ``(windows, length)`` and ``(windows, length, vocabulary)``.

    ``first`` is the position of a window's first scored token: behind its special tokens.

    A uniform distribution over V tokens has perplexity V:

    >>> round(perplexity([(torch.tensor([[0, 1, 2]]), torch.zeros(1, 3, 8))]), 6)
    8.0
    """
    return perplexity_of(scored(ids, logits, first) for ids, logits in batches)


def perplexity_of(sums: Iterable[tuple[float, int]]) -> float:
    """Perplexity from what ``scored`` gives for each batch, added in order.

    >>> perplexity_of([(0.0, 3), (0.0, 1)])
    1.0
    """
    total, count = 0.0, 0
    for loss, tokens in sums:
        total, count = total + loss, count + tokens
    if count == 0:
        raise LowbitError("perplexity of no tokens: give at least one window of two tokens")
    mean = total / count
    if math.isnan(mean):
        raise LowbitError(
            "the model's logits are NaN: its weights or its 16-bit arithmetic overflow; try --dtype float32"
        )
    return math.exp(mean) if mean < 700 else math.inf
