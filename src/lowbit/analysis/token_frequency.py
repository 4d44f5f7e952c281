"""Curvature of an embedding's rows with add-one smoothing: tokens that the text lacks occur in other texts."""

from __future__ import annotations

from torch import Tensor


def smoothed(curvature: Tensor, tokens: int) -> Tensor:
    """The curvature ``(vocabulary, width)`` with one more occurrence of every token, of average curvature.

    A row's curvature is that of one occurrence times the token's frequency, so the sum over rows is that of an
    average occurrence. With ``tokens`` occurrences in the text and one more of each of the vocabulary's:
    ``(tokens * curvature + sum) / (tokens + vocabulary)``. The sum over rows stays.

    Two tokens, of which three occurrences in the text are all of the first one; it then has 4 of 5 occurrences:

    >>> import torch
    >>> smoothed(torch.tensor([[10.0], [0.0]]), 3).tolist()
    [[8.0], [2.0]]
    """
    return (tokens * curvature + curvature.sum(0)) / (tokens + len(curvature))
