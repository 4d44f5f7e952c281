"""A small Llama whose widths are multiples of 256, trained on the built-in text: for formats with superblocks of 256.

SmolLM2-135M's width is 576, which K-quants do not divide. The model here has the same tokenizer pipeline with fewer
pieces, four layers, and a few minutes of training on one thread: enough for a perplexity that damage raises.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.checkpoints.resolve import load_tokenizer, resolve
from lowbit.data.text import calibration
from rows import ROOT

FOLDER = ROOT / "build" / "small-llama"
TEXT = "builtin:wiki"
VOCABULARY, LENGTH, BATCH, STEPS = 2048, 256, 8, 500
WARM_UP, RATE = 25, 3e-3
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def rate(step: int, steps: int) -> float:
    """The learning rate of a step: a linear start, then a cosine to zero.

    >>> rate(0, 500), rate(24, 500), rate(500, 500)
    (0.00012, 0.003, 0.0)
    """
    if step < WARM_UP:
        return RATE * (step + 1) / WARM_UP
    return RATE * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP))) / 2


def smaller_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer with the same pipeline and ``VOCABULARY`` pieces, learned from the training text."""

    def texts() -> Iterator[str]:
        windows = calibration(TEXT, tokenizer, 1024, 1024, seed=0, bos="never")
        yield from tokenizer.batch_decode(windows.ids)

    return tokenizer.train_new_from_iterator(texts(), VOCABULARY)


def small_llama(folder: Path = FOLDER, steps: int = STEPS) -> Path:
    """The folder of the model; trained now where it is not there yet."""
    if folder.exists():
        return folder
    tokenizer = smaller_tokenizer(load_tokenizer(resolve("demo").folder))
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **special))
    ids = calibration(TEXT, tokenizer, steps * BATCH, LENGTH, seed=0).ids
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
    for step, batch in enumerate(ids.split(BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"training the small Llama, step {step + 1} of {steps}: {loss.item():.3f} nats", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder
