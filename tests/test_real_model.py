"""The whole way on SmolLM2-135M-Instruct, from a package registry, and on its first layers; minutes on two cores."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.resolve import load_tokenizer, resolve
from lowbit.data.text import evaluation
from lowbit.runs.streamed_model import StreamedModel

pytestmark = pytest.mark.slow

TOKENS, LENGTH = 4096, 512


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("demo").folder


@pytest.fixture(scope="module")
def windows(folder):
    return evaluation("builtin", load_tokenizer(folder), LENGTH, TOKENS).ids


@pytest.fixture(scope="module")
def float_perplexity():
    return lowbit.evaluate("demo", data="builtin", length=LENGTH, tokens=TOKENS).perplexity["builtin"]


def divergences(model: Path, runs: Path, scheme: str, recipes: Sequence[str], **more) -> list[float]:
    """For recipes the mean KL divergence, in nats a token, of what they make of a model from the model itself."""
    more = {"data": "builtin", "samples": 16, "length": 128, **more}
    made = [lowbit.quantize(str(model), runs / name, scheme=scheme, recipe=name, **more).out for name in recipes]
    found = lowbit.compare(str(model), list(map(str, made)), data="builtin", length=256, tokens=1024)
    return [run["kl_mean"] for run in found.texts["builtin"]["runs"]]


def test_streamed_perplexity_equals_a_plain_transformers_loop(folder, windows, float_perplexity):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for window in windows:
            losses.append(model(window[None], labels=window[None]).loss.double())
    assert abs(math.exp(torch.stack(losses).mean()) - float_perplexity) < 1e-3


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
given = tokenizer("The capital of France is", return_tensors="pt")
with torch.no_grad():
    torch.save(model(given.input_ids).logits, sys.argv[2])
out = model.generate(**given, max_new_tokens=12, do_sample=False)
assert "lowbit" not in sys.modules
print(tokenizer.decode(out[0]))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", ["w4a16g32-sym", "w8a8"])
def test_stock_transformers_generates_from_the_folder(scheme, short_model, tmp_path):
    out = tmp_path / "run"
    lowbit.quantize(str(short_model), out, scheme=scheme, recipe="rtn", samples=4, length=64)
    command = [sys.executable, "-c", STOCK, str(out), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is")
    assert len(done.stdout) > len("The capital of France is") + 10
    ids = load_tokenizer(out)("The capital of France is", return_tensors="pt").input_ids
    simulated = torch.cat([logits for _, logits in StreamedModel(out).logits(ids)])
    stock = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert float((stock - simulated).abs().max() / simulated.abs().max()) < 1e-5


def test_eight_bits_lose_under_one_percent(tmp_path, float_perplexity):
    # docs/results.md: 0.23 % over 16384 tokens of WikiText-2, 0.5 % over 8192 of this text.
    made = lowbit.quantize("demo", tmp_path / "run", scheme="w8a16", recipe="rtn", samples=2, length=128)
    found = lowbit.evaluate(str(made.out), data="builtin", length=LENGTH, tokens=TOKENS).perplexity["builtin"]
    assert found < 1.01 * float_perplexity


def test_awq_and_gptq_beat_round_to_nearest_at_three_bits(short_model, tmp_path):
    rtn, awq, gptq = divergences(short_model, tmp_path, "w3a16g64-asym", ["rtn", "awq", "gptq"])
    assert max(awq, gptq) < 0.9 * rtn


def test_smoothquant_is_no_worse_than_round_to_nearest_with_eight_bit_activations(short_model, tmp_path):
    rtn, smoothquant = divergences(short_model, tmp_path, "w8a8", ["rtn", "smoothquant"])
    assert smoothquant <= rtn


@pytest.mark.heavy
def test_peak_memory_does_not_grow_with_depth():
    benchmark = Path(__file__).parent.parent / "benchmarks" / "memory.py"
    command = [sys.executable, str(benchmark), "--layers", "4", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


REST = {f"*.layers.{index}.*": "float" for index in (2, 3)}


def test_affinequant_beats_omniquant_beats_rounding_where_activations_have_four_bits(short_model, tmp_path):
    # Two layers keep it short; docs/affinequant.md has the whole model.
    recipes = ["rtn", "omniquant", "affinequant"]
    rtn, omniquant, affinequant = divergences(short_model, tmp_path, "w4a4", recipes, effort="quick", overrides=REST)
    assert affinequant < omniquant < rtn


def test_tune_brings_the_distributions_of_the_real_model_closer(short_model, tmp_path):
    recipe = tmp_path / "tuned.yaml"
    recipe.write_text("steps: [smoothquant, rtn, tune: {epochs: 2, held_out: 0.25}]\n")
    made = lowbit.quantize(
        str(short_model),
        tmp_path / "out",
        scheme="w4a4",
        recipe=str(recipe),
        samples=16,
        length=128,
        effort="paper",
        overrides=REST,
    )
    start, *after = made.manifest.blocks[0].steps["tune"]["held_out"]
    assert min(after) < 0.95 * start
