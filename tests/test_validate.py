"""Head and embedding under a config that ties them: every way to store the pair, as ``transformers`` reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowbit
from runs import quantize_tiny, streamed_logits
from tiny import save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
# By what is stored: changes to the tensors of a checkpoint that has the embedding alone.
STORED = {
    "the embedding": lambda t: t,
    "the head": lambda t: {**{k: v for k, v in t.items() if k != EMBED}, HEAD: t[EMBED]},
    "both": lambda t: {**t, HEAD: t[EMBED].clone()},
    "both, different": lambda t: {**t, HEAD: t[EMBED] * 0.9 + 0.01},
    "the embedding of a base model": lambda t: {k.removeprefix("model."): v for k, v in t.items()},
    "both in a base model": lambda t: {**{k.removeprefix("model."): v for k, v in t.items()}, HEAD: t[EMBED].clone()},
}
CASES = [(family, stored) for family in ("llama-odd", "gemma3") for stored in STORED] + [("opt", "the head")]


@pytest.mark.parametrize(("family", "stored"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_tied_pair_is_read_as_transformers_reads_it(family, stored, tmp_path: Path, capsys):
    m, ids = tmp_path / "m", tiny_ids(2, 12)
    save_tiny(m, family)
    file = m / "model.safetensors"
    tensors = load_file(file)
    assert HEAD not in tensors
    if family == "opt":
        head = tensors.pop("model.decoder.embed_tokens.weight")
        save_file({**tensors, HEAD: head}, file, metadata={"format": "pt"})
    else:
        save_file(STORED[stored](tensors), file, metadata={"format": "pt"})
    with torch.no_grad():
        right = AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32)(ids).logits
        assert torch.allclose(lowbit.load(m)(ids).logits, right, atol=1e-5)
    assert torch.allclose(streamed_logits(m, ids), right, atol=1e-5)
    run = quantize_tiny(m, tmp_path / "run", "w8a16g32-sym").out
    with torch.no_grad():
        ours = lowbit.load(run)(ids).logits
        assert torch.allclose(ours, right, rtol=0, atol=0.1 * float(right.std()))
        stock = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)(ids).logits
        assert torch.allclose(stock, ours, atol=1e-4 * float(right.abs().max()))
    differs = stored == "both, different"
    assert ("differs from" in capsys.readouterr().err) is differs
    config = json.loads((run / "config.json").read_text())
    assert bool(config.get("tie_word_embeddings", True)) is not differs


def test_a_pair_that_is_not_tied_needs_both(tmp_path: Path):
    save_tiny(tmp_path / "m", "llama")
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    for missing in (HEAD, EMBED):
        save_file({k: v for k, v in tensors.items() if k != missing}, file, metadata={"format": "pt"})
        with pytest.raises(lowbit.LowbitError, match=f"has no tensor '{missing}'"):
            quantize_tiny(tmp_path / "m", tmp_path / "run", "w8a16")
