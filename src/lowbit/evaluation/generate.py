"""Greedy text generation for ``lowbit generate``, ``compare`` and ``demo``."""

from __future__ import annotations

from pathlib import Path

import torch

from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.errors import LowbitError
from lowbit.runs.load import load
from lowbit.torch_state import own_torch_state


@own_torch_state
def generate_text(folder: Path, prompt: str, tokens: int, trust_remote_code: bool = False) -> str:
    """The prompt and its greedy continuation by up to ``tokens`` tokens."""
    tokenizer = load_tokenizer(folder, trust_remote_code)
    model = load(folder, trust_remote_code=trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and inputs.input_ids.shape[1] + tokens > limit:
        raise LowbitError(
            f"the prompt has {inputs.input_ids.shape[1]} tokens and --tokens is {tokens}: "
            f"this model's positions end at {limit}"
        )
    if int(inputs.input_ids.max()) >= model.config.vocab_size:
        raise LowbitError(f"{folder}: the tokenizer has ids beyond the model's {model.config.vocab_size} embeddings")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
