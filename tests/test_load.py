"""A loaded run is an ordinary model: copied or cast it computes the same; it is saved whole or not at all."""

from __future__ import annotations

import copy
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import LowbitError
from tiny import save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

IDS = tiny_ids(2, 12)
# By name a scheme, a recipe file and what saving would lose.
KINDS = {
    "inputs": ("w4a8", "steps: [rtn]", ["inputs quantized as"]),
    "clipped inputs": ("w4a8", "steps: [affinequant: {act_clip: true, epochs: 1}, rtn]", ["inputs quantized as"]),
    "kv": ("w4a16kv4", "steps: [rtn]", ["queries, keys and values quantized as"]),
    "matrices": ("w4a16g16-sym", "steps: [affinequant: {qkv: matrix, mlp: matrix, epochs: 2}, rtn]", ["matrices"]),
    "gathers": ("w4a4kv4", "steps: [reassemble, rtn]", ["gathers", "inputs quantized as", "queries"]),
    "runtime": ("llama.cpp", "steps: [rtn]", ["inputs quantized as llama.cpp"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run folders by kind, each made once."""
    root = tmp_path_factory.mktemp("load")
    save_tiny(root / "m", "llama", num_hidden_layers=2, hidden_size=64, intermediate_size=128)

    def run(kind: str, scheme: str = "", recipe: str = "") -> Path:
        scheme, recipe = scheme or KINDS[kind][0], recipe or KINDS[kind][1]
        if not (root / kind).exists():
            (root / f"{kind}.yaml").write_text(recipe)
            chosen = {"target": scheme} if scheme == "llama.cpp" else {"scheme": scheme}
            sizes = {"data": str(root / "m" / "calib.txt"), "samples": 4, "length": 12, "effort": "paper"}
            lowbit.quantize(str(root / "m"), root / kind, recipe=str(root / f"{kind}.yaml"), **chosen, **sizes)
        return root / kind

    return run


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_saved_model_would_lack_is_said_before_anything_is_written(kind, made, tmp_path):
    model = lowbit.load(made(kind))
    for save in (model.save_pretrained, model.push_to_hub, copy.deepcopy(model).save_pretrained):
        with pytest.raises(LowbitError) as caught:
            save(str(tmp_path / "saved"))
        assert "\n" not in str(caught.value)
        for part in (*KINDS[kind][2], str(made(kind)), "lowbit export"):
            assert part in str(caught.value)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_compute_the_same(kind, made):
    model = lowbit.load(made(kind))
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_another_dtype_the_ops_and_the_quantization_remain(kind, dtype, made):
    model = lowbit.load(made(kind))
    expected, cast = logits(model), model.to(dtype)
    got = logits(cast).to(torch.float32)
    # Codes of inputs may flip between neighbours in 16 bits; without the ops the distance is of order 1.
    assert float((got - expected).norm() / expected.norm()) < (0.1 if dtype.itemsize > 2 else 0.35)
    with pytest.raises(LowbitError, match="save_pretrained"):
        cast.save_pretrained("never")


OPEN = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
ids, expected = torch.load(sys.argv[2])
with torch.no_grad():
    print(torch.equal(model(ids, use_cache=False).logits, expected))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["kv", "gathers"])
def test_a_pickled_model_computes_the_same_in_another_process(kind, made, tmp_path):
    model = lowbit.load(made(kind))
    torch.save(model, tmp_path / "model.pt")
    torch.save((IDS, logits(model)), tmp_path / "expected.pt")
    command = [sys.executable, "-c", f"import torch; torch.set_num_threads(1)\n{OPEN}", *map(str, tmp_path.iterdir())]
    command[3:] = [str(tmp_path / "model.pt"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("scheme", ["w4a16g16-sym", "w3a16-asym"])
@pytest.mark.parametrize("family", ["llama", "llama-odd", "gemma2"])
def test_a_weight_only_run_is_saved_with_the_same_logits(scheme, family, tmp_path):
    save_tiny(tmp_path / "m", family, num_hidden_layers=2)
    sizes = {"data": str(tmp_path / "m" / "calib.txt"), "samples": 2, "length": 8}
    overrides = {"*embed_tokens": "w8"} if family == "llama-odd" else {}
    lowbit.quantize(str(tmp_path / "m"), tmp_path / "run", scheme=scheme, recipe="rtn", overrides=overrides, **sizes)
    model = lowbit.load(tmp_path / "run")
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "run" / "tokenizer.json", tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()), expected)
    assert torch.equal(logits(lowbit.load(tmp_path / "saved")), expected)


def test_with_float_inputs_a_runtimes_run_is_saved(made, tmp_path):
    model = lowbit.load(made("runtime"), target="float")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()), logits(model))
