"""Massive tokens: those whose hidden states are far larger than a usual token's.

A token's size is the largest absolute value of its hidden state, normalized by the median of all tokens: usual tokens
are near 1, massive ones reach hundreds (Sun et al. 2024, arXiv 2402.17762; PrefixQuant, arXiv 2410.05265, section 4).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

# PrefixQuant's threshold for a token's size.
RATIO = 64.0


def massive(hidden: Tensor) -> Tensor:
    """Which tokens are massive ``(sequences, length)``, of hidden states ``(sequences, length, width)``.

    Sizes 200, 1, 2 and 2 have a median of 2; in its units the first one is 100:

    >>> massive(torch.tensor([[[200.0, 1.0], [1.0, 0.0], [0.0, -2.0], [2.0, 1.0]]])).tolist()
    [[True, False, False, False]]
    """
    size = hidden.detach().abs().amax(-1)
    # The middle value of an even count is the lower one.
    return size > RATIO * size.median().clamp(min=torch.finfo(size.dtype).tiny)


def per_window(layers: Sequence[Tensor], first: int) -> float:
    """Massive tokens in a window, on average over windows, in the layer that has most.

    Args:
        layers: ``(windows, length)`` of each layer, whether a token is massive behind it.
        first: position of the first token that counts: behind the special tokens in front of each window.

    >>> per_window([torch.tensor([[True, False], [True, True]]), torch.tensor([[False, False], [False, True]])], 0)
    1.5
    """
    return max((float(layer[:, first:].double().sum(1).mean()) for layer in layers), default=0.0)


def chosen(ids: Tensor, layers: Sequence[Tensor], first: int, start: int | None, most: int) -> tuple[int, ...]:
    """The tokens that a prefix has: as many as a window has massive ones, the most frequent of these.

    Where the first token of a text is massive whatever it is, the prefix ends with ``start`` in its place.

    Args:
        ids: ``(windows, length)``.
        layers, first: as for ``per_window``.
        start: the token with which texts of the model start, such as BOS; ``None``: it has none.
        most: the largest number of tokens.

    Windows whose first token is massive, and token 5 wherever it is; texts start with token 1:

    >>> ids = torch.tensor([[7, 5, 8], [9, 8, 5]])
    >>> chosen(ids, [torch.tensor([[True, True, False], [True, False, True]])], 0, 1, 8)
    (5, 1)
    """
    count = min(most, math.ceil(per_window(layers, first)))
    if count == 0:
        return ()
    found = torch.stack(list(layers)).any(0)
    found[:, :first] = False
    at_start = first == 0 and bool(found[:, 0].double().mean() > 0.5)
    inside = Counter(ids[:, 1:][found[:, 1:]].tolist() if at_start else ids[found].tolist())
    ranked = [token for token, _ in sorted(inside.items(), key=lambda item: (-item[1], item[0]))]
    if not at_start:
        return tuple(ranked[:count])
    last = start if start is not None else (ranked or [int(ids[:, 0].mode().values)])[0]
    return (*[token for token in ranked if token != last][: count - 1], last)
