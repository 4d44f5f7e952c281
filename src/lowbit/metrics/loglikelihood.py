"""How likely a model finds one text behind another: what multiple-choice tasks ask.

For a context ``c`` and a continuation ``t`` the answer is ``sum_i log p(t_i | c, t_1 .. t_{i-1})``, and whether each
``t_i`` is the most likely token at its place. Choices:

* Batches hold inputs of like length, padded on the right: in a causal model no token sees what comes behind it, and
  every rounding here is per token, so padding changes nothing.
* Logits are made for the continuations' tokens only; those of a whole batch would be mostly context.
* Two requests with the same input (a question with the one-token answers "yes" and "no") are computed once.

Rejected: sharing the context's keys and values between the choices of a question, which saves up to two thirds of
the work and needs a cache through every family's attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.progress import say

BATCH_TOKENS = 4096  # in a batch, padding included
SCORED = 64  # tokens whose logits are made at once; no model has fewer positions

Pair = tuple[Sequence[int], Sequence[int]]


class Stream(Protocol):
    """A model whose blocks are read when they are run."""

    def last_hidden(
        self, texts: Sequence[Tensor], batch: int = ..., title: str = ...
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The last block's output ``(which text, ids, (windows, length, hidden))`` of texts of any length."""
        ...

    def token_scores(self, hidden: Tensor) -> Tensor:
        """Logits ``(tokens, vocabulary)`` of tokens ``(tokens, hidden)``, wherever they stand."""
        ...


@torch.no_grad()
def loglikelihoods(model: Stream, pairs: Sequence[Pair], positions: int, title: str) -> list[tuple[float, bool]]:
    """For each ``(context, continuation)`` in token ids its log-likelihood and whether it is the greedy one.

    Args:
        model: a streamed model.
        pairs: neither part is empty, a continuation has ``positions`` tokens at most.
        positions: how many tokens the model can see; of a longer input the last ones remain.
        title: beside the progress bar.

    Raises:
        LowbitError: an empty part, too long a continuation, or logits that are NaN.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= positions:
            raise LowbitError(
                f"{title}: a question of {len(context)} tokens has an answer of {len(continuation)}; the model takes "
                f"1 to {positions}"
            )
        inputs.setdefault(_seen(context, continuation, positions), []).append(number)
    if cut := sum(len(context) + len(continuation) > positions + 1 for context, continuation in pairs):
        say(f"{title}: {cut} of {len(pairs)} inputs exceed the model's {positions} positions; their ends are scored")
    batches = list(_batches(sorted(inputs, key=lambda ids: (-len(ids), ids))))
    found: dict[int, tuple[float, bool]] = {}
    for which, _, hidden in model.last_hidden([_padded(rows) for rows in batches], BATCH_TOKENS, title):
        for row, ids in enumerate(batches[which]):
            for number in inputs[ids]:
                answer = torch.tensor(pairs[number][1], device=hidden.device)
                found[number] = _score(model, hidden[row, len(ids) - len(answer) : len(ids)], answer)
    return [found[number] for number in range(len(pairs))]


def _seen(context: Sequence[int], continuation: Sequence[int], positions: int) -> tuple[int, ...]:
    """What the model is shown: all but the last token, cut on the left.

    >>> _seen([1, 2, 3], [4, 5], 3)
    (2, 3, 4)
    """
    return (*context, *continuation)[-(positions + 1) : -1]


def _batches(inputs: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Inputs, longest first, in groups of ``BATCH_TOKENS`` at most when padded; a group holds one at least."""
    start = 0
    while start < len(inputs):
        rows = max(1, BATCH_TOKENS // len(inputs[start]))
        yield list(inputs[start : start + rows])
        start += rows


def _padded(rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Rows as one tensor ``(rows, longest)``, with token 0 behind the short ones.

    >>> _padded([(3, 4, 5), (6,)]).tolist()
    [[3, 4, 5], [6, 0, 0]]
    """
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def _score(model: Stream, hidden: Tensor, answer: Tensor) -> tuple[float, bool]:
    """Log-likelihood of ``answer`` ``(tokens,)`` from the states before each of its tokens, ``(tokens, hidden)``."""
    total, greedy = 0.0, True
    for states, tokens in zip(hidden.split(SCORED), answer.split(SCORED), strict=True):
        logs = model.token_scores(states).float().log_softmax(-1)
        total += float(logs.gather(1, tokens[:, None]).double().sum())
        greedy = greedy and bool((logs.argmax(-1) == tokens).all())
    if total != total:
        raise LowbitError(
            "the model's logits are NaN: its weights or its 16-bit arithmetic overflow; try --dtype float32"
        )
    return total, greedy
