"""Calibration text that the model samples itself: ``data=self``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.checkpoints.positions import positions_of
from lowbit.checkpoints.token_ids import token_ids
from lowbit.errors import LowbitError, check_least
from lowbit.finite import is_finite
from lowbit.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer


def self_sample(
    model: Model,
    tokenizer: Tokenizer,
    n: int,
    length: int,
    seed: int,
    batch: int = 16,
    start: Sequence[int] | None = None,
) -> Tensor:
    """Text sampled from a causal language model: ``(n, length)`` int64 ids on the CPU.

    A row starts with the ids ``start``, by default BOS, with a random token where there are none, and continues at
    temperature 1. Special tokens,
    EOS among them, are not drawn, so that rows are full. Token ``t`` of row ``i`` is where the cumulative
    distribution exceeds ``u[i, t]`` of one seeded float64 draw: ``batch`` only sets how many rows run at once, and
    the global generator is not used. With probabilities ``[0.5, 0.25, 0.25]`` a draw of 0.6 selects token 1. Raises
    ``LowbitError`` for sizes below 1 (``length``: 2), a ``length`` beyond the model's positions and non-finite
    output. ``model`` is left in eval mode.
    """
    for name, size, least in (("n", n, 1), ("length", length, 2), ("batch", batch, 1)):
        check_least(name, size, least, "give more")
    limit = positions_of(model.config.get_text_config())
    if limit is not None and length > limit:
        raise LowbitError(f"length {length} given; the model has {limit} positions: give a shorter length")
    uniform = torch.rand(n, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    eos = model.generation_config.eos_token_id
    special = {*tokenizer.all_special_ids, *token_ids(eos, "eos_token_id")}
    size = min(len(tokenizer), model.get_output_embeddings().weight.shape[0])
    allowed = torch.tensor([i for i in range(size) if i not in special])
    model.eval()
    if start is None:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return torch.cat([_sample(model, draws, allowed, start) for draws in uniform.split(batch)])


@torch.no_grad()
def _sample(model: Model, uniform: Tensor, allowed: Tensor, start: Sequence[int]) -> Tensor:
    ids = torch.empty(uniform.shape, dtype=torch.int64)
    if start:
        ids[:, : len(start)] = torch.tensor(start)[: uniform.shape[1]]
    else:
        ids[:, 0] = allowed[(uniform[:, 0] * len(allowed)).long()]
    name, cache = cache_name(model), None
    for step in track(range(1, uniform.shape[1]), f"sampling {len(ids)} texts"):
        given = {name: cache, "use_cache": True}
        out = model(input_ids=ids[:, step - 1 : step].to(model.device), **given)
        cache = out[name]
        if step < len(start):
            continue
        cdf = out.logits[:, -1].cpu().double()[:, allowed].softmax(-1).cumsum(-1)
        if not is_finite(cdf):
            raise LowbitError(f"the model's output is not finite at token {step}: give a text instead of 'self'")
        position = torch.searchsorted(cdf, uniform[:, step : step + 1] * cdf[:, -1:], right=True)
        ids[:, step] = allowed[position[:, 0].clamp(max=len(allowed) - 1)]
    return ids


def cache_name(model: Any) -> str:
    """What the model calls its cache of keys and values, as an argument and in its output.

    From transformers 5.24 on it is ``cache``; the name before, which 5.23 and code of a model's own have, is
    deprecated there.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
