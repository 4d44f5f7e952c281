"""Log-likelihood of a continuation given a context, as multiple-choice tasks need it.

For a context ``c`` and a continuation ``t`` the result is ``sum_i log p(t_i | c, t_1 .. t_{i-1})``, and whether each
``t_i`` is the most likely token at its position. Choices:

* Batches hold inputs of similar length, padded on the right: in a causal model no token attends to later ones, and
  activations are quantized per token, so padding has no effect.
* Logits are computed for the continuations' tokens only; those of a whole batch would be mostly context.
* Requests with the same input (a question with the one-token answers "yes" and "no") are computed once.

Rejected: sharing the context's keys and values between the choices of a question, which saves up to two thirds of
the work but needs a cache in every family's attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lowbit.distributed.exchange import from_everyone
from lowbit.distributed.share import own_items
from lowbit.distributed.world import ONE, within
from lowbit.errors import LowbitError
from lowbit.progress import say

BATCH_TOKENS = 4096  # per batch, padding included
SCORED = 64  # tokens whose logits are computed at once; no model has fewer positions

Pair = tuple[Sequence[int], Sequence[int]]


class Stream(Protocol):
    """A model whose blocks are read as they run."""

    def check_ids(self, ids: Tensor) -> None:
        """Refuse token ids beyond the model's embeddings."""
        ...

    def last_hidden(
        self, batches: Sequence[tuple[int, Tensor]], title: str = ...
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The last block's output ``(number, ids, (windows, length, hidden))`` of numbered batches of any length."""
        ...

    def token_scores(self, hidden: Tensor) -> Tensor:
        """Logits ``(tokens, vocabulary)`` from hidden states ``(tokens, hidden)`` at any positions."""
        ...


@torch.no_grad()
def loglikelihoods(model: Stream, pairs: Sequence[Pair], positions: int, title: str) -> list[tuple[float, bool]]:
    """For each ``(context, continuation)`` in token ids, its log-likelihood and whether it is the greedy choice.

    The processes of a job share the batches.

    Args:
        model: a streamed model.
        pairs: contexts and continuations, not empty; a continuation has at most ``positions`` tokens.
        positions: maximum number of input tokens; longer inputs keep their last ones.
        title: label of the progress bar.

    Raises:
        LowbitError: an empty part, a continuation that is too long, a token that the model does not have, or NaN
            logits.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= positions:
            raise LowbitError(
                f"{title}: a question of {len(context)} tokens has an answer of {len(continuation)}; the model takes "
                f"1 to {positions}"
            )
        inputs.setdefault(_visible(context, continuation, positions), []).append(number)
    if pairs:
        model.check_ids(torch.tensor([max(max(context), max(continuation)) for context, continuation in pairs]))
    if truncated := sum(len(context) + len(continuation) > positions + 1 for context, continuation in pairs):
        say(f"{title}: {truncated} of {len(pairs)} inputs exceed the model's {positions} positions; left-truncated")
    batches = list(_batches(sorted(inputs, key=lambda ids: (-len(ids), ids))))
    own = own_items([(number, _padded(rows)) for number, rows in enumerate(batches)])
    found: list[tuple[int, float, bool]] = []
    with within(ONE):
        for which, _, hidden in model.last_hidden(own, title):
            for row, ids in enumerate(batches[which]):
                for number in inputs[ids]:
                    answer = torch.tensor(pairs[number][1], device=hidden.device)
                    score = _score(model, hidden[row, len(ids) - len(answer) : len(ids)], answer)
                    found.append((number, *score))
    scores = {number: (total, greedy) for process in from_everyone(found) for number, total, greedy in process}
    return [scores[number] for number in range(len(pairs))]


def _visible(context: Sequence[int], continuation: Sequence[int], positions: int) -> tuple[int, ...]:
    """The model's input: all but the last token, truncated on the left.

    >>> _visible([1, 2, 3], [4, 5], 3)
    (2, 3, 4)
    """
    return (*context, *continuation)[-(positions + 1) : -1]


def _batches(inputs: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Inputs, longest first, in batches of at most ``BATCH_TOKENS`` when padded, but at least one input."""
    start = 0
    while start < len(inputs):
        rows = max(1, BATCH_TOKENS // len(inputs[start]))
        yield list(inputs[start : start + rows])
        start += rows


def _padded(rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Rows as one tensor ``(rows, longest)``, padded on the right with token 0.

    >>> _padded([(3, 4, 5), (6,)]).tolist()
    [[3, 4, 5], [6, 0, 0]]
    """
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def _score(model: Stream, hidden: Tensor, answer: Tensor) -> tuple[float, bool]:
    """Log-likelihood of ``answer`` ``(tokens,)`` from the hidden states before its tokens, ``(tokens, hidden)``."""
    total, greedy = 0.0, True
    for states, tokens in zip(hidden.split(SCORED), answer.split(SCORED), strict=True):
        log_probs = model.token_scores(states).float().log_softmax(-1)
        total += float(log_probs.gather(1, tokens[:, None]).double().sum())
        greedy = greedy and bool((log_probs.argmax(-1) == tokens).all())
    if total != total:
        raise LowbitError(
            "the model's logits are NaN: its weights or its 16-bit arithmetic overflow; try --dtype float32"
        )
    return total, greedy
