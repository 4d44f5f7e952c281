"""Greedy text generation for ``lowbit generate``, ``compare`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lowbit.checkpoints.positions import positions_of
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.checkpoints.token_ids import token_ids
from lowbit.data.tokenization import decode, encode
from lowbit.errors import LowbitError
from lowbit.models.build import text_config
from lowbit.runs.load import load
from lowbit.runs.prefix_forward import tokens_before
from lowbit.torch_state import own_torch_state


@own_torch_state
def generate_text(folder: Path, prompt: str, tokens: int, trust_remote_code: bool = False) -> str:
    """The prompt and its greedy continuation by up to ``tokens`` tokens."""
    tokenizer = load_tokenizer(folder, trust_remote_code)
    model = load(folder, trust_remote_code=trust_remote_code)
    ids = prompt_ids(folder, tokenizer, text_config(model.config), tokens_before(model), prompt, tokens)
    return decode(tokenizer, greedy(model, ids, tokens)[0].tolist(), skip_special_tokens=True)


def prompt_ids(folder: Path, tokenizer: Any, config: Any, prefix: int, prompt: str, tokens: int) -> Tensor:
    """A prompt's ids ``(1, length)``; refused where the model cannot read it and ``tokens`` more.

    Args:
        folder: of the model, for errors.
        tokenizer: the model's.
        config: of its text model.
        prefix: tokens in front of every text.
        prompt: the text.
        tokens: how many may follow.
    """
    ids = torch.tensor([encode(tokenizer, prompt, special_tokens=True)], dtype=torch.int64)
    if not ids.numel():
        raise LowbitError(f"the tokenizer in {folder} makes no token of the prompt {prompt!r}: give another one")
    limit = positions_of(config)
    if limit and prefix + ids.shape[1] + tokens > limit:
        front = f", the prefix {prefix}" if prefix else ""
        raise LowbitError(
            f"the prompt has {ids.shape[1]} tokens{front}, and --tokens is {tokens}: this model's positions end at "
            f"{limit}"
        )
    if int(ids.max()) >= config.vocab_size:
        raise LowbitError(f"{folder}: the tokenizer has ids beyond the model's {config.vocab_size} embeddings")
    return ids


@torch.no_grad()
def greedy(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """``ids`` ``(1, length)`` continued by the most likely token, up to ``tokens`` times or to the end of the text.

    Of a checkpoint's ``generation_config.json`` only the ids that end a text count: beams, penalties, forced and
    forbidden tokens, lengths and cache kinds would make it another search. The library fills what a given config
    leaves open from the model's own, which is therefore replaced meanwhile. Raises ``LowbitError`` for ids that are
    none.
    """
    own = model.generation_config
    stated = own.eos_token_id if own.eos_token_id is not None else text_config(model.config).eos_token_id
    ends = token_ids(stated, "eos_token_id")
    chosen = GenerationConfig(max_new_tokens=tokens, do_sample=False, num_beams=1, use_cache=True)
    chosen.eos_token_id = ends or None
    # Only says what a batch would be filled with; there is one sequence.
    chosen.pad_token_id = next(iter(token_ids(own.pad_token_id, "pad_token_id") or ends), None)
    model.generation_config = GenerationConfig()
    try:
        out: Tensor = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=chosen)
    finally:
        model.generation_config = own
    return out
