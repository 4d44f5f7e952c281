"""Token-level comparison of next-token distributions with those of a float model.

All models see the same windows and run block by block in lockstep, so that one block of each is in memory and every
block's output can be compared with the float model's. With ``p`` the float model's distribution over the vocabulary
and ``q`` another model's, a token's divergence is ``KL(p || q) = sum_v p(v) (log p(v) - log q(v))`` in nats, in
float64: equal models give exactly 0. A window's last position has no target token and is excluded.

Rejected: logits of a whole batch (a vocabulary of 256,000 takes 8 GB for 4 x 2048 tokens, for each model); they are
computed for at most ``LOGIT_BYTES`` of tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.distributed.exchange import with_tensors
from lowbit.errors import LowbitError
from lowbit.progress import track

LOGIT_BYTES = 1 << 26  # float64 logits of one model held at once
RESAMPLES, CONFIDENCE = 2000, 0.95


class Stream(Protocol):
    """A model whose blocks are read as they run."""

    @property
    def blocks(self) -> int:
        """Number of decoder layers."""
        ...

    def enter(self, ids: Tensor) -> Tensor:
        """Hidden states ``(windows, length, hidden)`` at the input of block 0."""
        ...

    def through(self, index: int, batches: Sequence[Tensor]) -> list[Tensor]:
        """Run batches of hidden states through one block."""
        ...

    def scores(self, ids: Tensor, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Logits ``(windows, stop - start, vocabulary)`` from the last block's output at these positions."""
        ...


@dataclass
class Told:
    """Token-level records of one model on a text; each window adds a tensor ``(1, scored tokens)`` to the lists.

    Attributes:
        loss: ``-log q(token | tokens before it)`` in float64.
        divergence: ``KL(p || q)`` in nats; empty for the float model itself.
        agrees: whether the most likely token is the float model's; empty for the float model itself.
        block_error: for each batch and block, the sum over tokens of ``||y - y_float||^2 / ||y_float||^2``; empty
            for the float model itself.
        tokens: number of tokens in those sums.
    """

    loss: list[Tensor] = field(default_factory=list)
    divergence: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    block_error: list[list[float]] = field(default_factory=list)
    tokens: int = 0


@torch.no_grad()
def listen(
    exact: Stream, runs: Sequence[Stream], passes: Iterable[list[tuple[int, Tensor]]], first: Sequence[int]
) -> list[list[Told]]:
    """Records of the float model and each run on each text: ``[text][0: float, 1: first run, ...]``.

    ``passes`` are groups of batches ``(which text, ids (windows, length))`` that run through the blocks together;
    ``first`` gives each text's position of the first scored token of a window.
    """
    models = [exact, *runs]
    records = [[Told() for _ in models] for _ in first]
    for group in passes:
        states = [[model.enter(ids) for _, ids in group] for model in models]
        errors: list[list[list[float]]] = [[[] for _ in runs] for _ in group]
        for index in track(range(exact.blocks), "blocks"):
            states = [model.through(index, xs) for model, xs in zip(models, states, strict=True)]
            for batch in range(len(group)):
                for error, xs in zip(errors[batch], states[1:], strict=True):
                    error.append(token_error(xs[batch], states[0][batch]))
        for batch, (text, _) in enumerate(group):
            for record, error in zip(records[text][1:], errors[batch], strict=True):
                record.block_error.append(error)
        for batch, (text, ids) in enumerate(group):
            for window in range(len(ids)):
                hidden = [xs[batch][window : window + 1] for xs in states]
                _record_window(models, ids[window : window + 1], hidden, records[text], first[text])
            for record in records[text]:
                record.tokens += ids.numel()
    return records


def of_everyone(records: Sequence[Sequence[Told]]) -> list[list[Told]]:
    """Records of all batches, by text and model, of which each process has those of consecutive batches."""
    return [[_of_everyone(record) for record in text] for text in records]


def _of_everyone(record: Told) -> Told:
    whole, lists = Told(), (record.loss, record.divergence, record.agrees)
    data = [record.block_error, record.tokens, [len(own) for own in lists]]
    for (errors, tokens, counts), found in with_tensors(data, [one for own in lists for one in own]):
        windows = iter(found)
        for target, count in zip((whole.loss, whole.divergence, whole.agrees), counts, strict=True):
            target += [next(windows) for _ in range(count)]
        whole.block_error += errors
        whole.tokens += tokens
    return whole


def token_error(got: Tensor, exact: Tensor) -> float:
    """Sum over tokens of ``||got - exact||^2 / ||exact||^2``, hidden states ``(windows, length, hidden)``.

    >>> token_error(torch.tensor([[[1.0, 2.0], [3.0, 3.0]]]), torch.tensor([[[1.0, 1.0], [3.0, 3.0]]]))
    0.5
    """
    exact = exact.double()
    power = exact.square().sum(-1).clamp(min=1e-300)
    return float(((got.double() - exact).square().sum(-1) / power).sum())


def _record_window(
    models: Sequence[Stream], ids: Tensor, hidden: Sequence[Tensor], records: Sequence[Told], first: int
) -> None:
    """Record one window ``(1, length)`` from its token ``first`` on, a few positions at a time."""
    last, step = ids.shape[1] - 1, 1  # one position first, to learn the size of the vocabulary
    parts: list[list[list[Tensor]]] = [[[], [], []] for _ in models]
    start = first - 1
    while start < last:
        stop = min(start + step, last)
        nexts = ids[:, start + 1 : stop + 1]
        p: Tensor | None = None
        for model, x, (losses, kls, same) in zip(models, hidden, parts, strict=True):
            q = model.scores(ids, x, start, stop).double().log_softmax(-1)
            losses.append(-q.gather(-1, nexts.to(q.device)[..., None])[..., 0].cpu())
            if p is None:
                p = q
                continue
            if q.shape != p.shape:
                raise LowbitError(f"vocabularies of {p.shape[-1]} and {q.shape[-1]} tokens are not comparable")
            kls.append((p.exp() * (p - q)).sum(-1).cpu())
            same.append((p.argmax(-1) == q.argmax(-1)).cpu())
        if p is not None:
            step = max(1, LOGIT_BYTES // (8 * p.shape[-1]))
        start = stop
    for record, (losses, kls, same) in zip(records, parts, strict=True):
        record.loss.append(torch.cat(losses, 1))
        if kls:
            record.divergence.append(torch.cat(kls, 1))
            record.agrees.append(torch.cat(same, 1))


def summary(records: Sequence[Told], seed: int, names: Sequence[str]) -> dict[str, Any]:
    """Summary of one text as plain data: the float model's perplexity and a row for each run.

    ``names`` of the float model and the runs appear in errors.
    """
    losses = [torch.cat(record.loss) for record in records]
    for name, loss in zip(names, losses, strict=True):
        if bool(loss.isnan().any()):
            raise LowbitError(
                f"{name}: its logits are NaN; its weights or 16-bit arithmetic overflow: --dtype float32"
            )
    rows = []
    for record, loss in zip(records[1:], losses[1:], strict=True):
        low, high = ratio_interval(losses[0], loss, seed)
        kl, agrees = torch.cat(record.divergence), torch.cat(record.agrees)
        rows.append(
            {
                "perplexity": _exp(float(loss.mean())),
                "ratio": _exp(float((loss - losses[0]).mean())),
                "ratio_low": low,
                "ratio_high": high,
                "kl_mean": float(kl.mean()),
                "kl_p99": percentile(kl, 99),
                "top1_agreement": float(agrees.double().mean()),
                "block_error": [sum(batches) / record.tokens for batches in zip(*record.block_error, strict=True)],
            }
        )
    return {"windows": len(losses[0]), "perplexity": _exp(float(losses[0].mean())), "runs": rows}


def percentile(values: Tensor, percent: float) -> float:
    """The smallest value that at least ``percent`` percent of the values do not exceed.

    >>> percentile(torch.tensor([4.0, 1.0, 3.0, 2.0]), 50)
    2.0
    """
    flat = values.flatten()
    return float(flat.kthvalue(max(1, math.ceil(flat.numel() * percent / 100))).values)


def ratio_interval(exact: Tensor, other: Tensor, seed: int) -> tuple[float | None, float | None]:
    """A 95 % bootstrap interval of ``perplexity(other) / perplexity(exact)``, from losses ``(windows, tokens)``.

    Windows are resampled with replacement, the same for both models (a paired bootstrap). One window has no spread:
    ``(None, None)``.
    """
    differences = (other - exact).mean(1)
    count = len(differences)
    if count < 2:
        return None, None
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES))
    means = torch.stack([differences[draw].mean() for draw in draws])
    tail = 50 * (1 - CONFIDENCE)
    return _exp(percentile(means, tail)), _exp(percentile(means, 100 - tail))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
