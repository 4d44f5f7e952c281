"""From a checkpoint to a run folder: what was evaluated is what is shipped, in every reader, and after any kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.safetensors_folder import read_json
from lowbit.models.block import relative_error
from lowbit.runs.streamed_model import StreamedModel
from tiny import NAMES, save_tiny, tiny_ids

# Two correct computations of one function in float32 differ by rounding; logits here are of order 10.
CLOSE = 1e-5


def quantized(folder: Path, out: Path, scheme: str, recipe: str = "rtn", **more):
    calib = str(folder / "calib.txt")
    return lowbit.quantize(str(folder), out, scheme=scheme, recipe=recipe, data=calib, samples=4, length=24, **more)


def streamed_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits for _, logits in StreamedModel(folder).logits(ids)])


def stock_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((got - wanted).abs().max() / wanted.abs().max()) < CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_stock_transformers_and_load_give_the_simulated_logits(name, tmp_path):
    model = save_tiny(tmp_path / "m", name)
    ids = tiny_ids()
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
    for scheme in ("w4a16g16-sym", "w4a8", "w3a16-asym"):
        if name == "phi3" and scheme == "w3a16-asym":
            continue
        out = tmp_path / scheme
        made = quantized(tmp_path / "m", out, scheme)
        simulated = streamed_logits(out, ids)
        assert relative_error(simulated, exact) > 1e-6
        assert_same(lowbit.load(out)(ids, use_cache=False).logits.detach(), simulated)
        loads = made.manifest["transformers"]["loads"]
        assert loads == (not (name == "opt" and scheme == "w4a8"))
        if loads:
            assert_same(stock_logits(out, ids), simulated)


@pytest.mark.parametrize(
    "scheme",
    [f"w{bits}a16{group}-{kind}" for bits in range(2, 9) for group in ("", "g16") for kind in ("sym", "asym")]
    + [f"w4a{bits}{group}-{kind}" for bits in (4, 6, 8) for group in ("", "g16") for kind in ("sym", "asym")],
)
def test_every_scheme_loads_in_stock_transformers(scheme, tmp_path):
    save_tiny(tmp_path / "m", "llama-odd")
    made = quantized(tmp_path / "m", tmp_path / "out", scheme)
    assert made.manifest["transformers"]["loads"]
    assert_same(stock_logits(tmp_path / "out", tiny_ids()), streamed_logits(tmp_path / "out", tiny_ids()))


@pytest.mark.parametrize("name", ["llama", "llama-odd", "gemma3", "opt"])
def test_kv_schemes_load_with_lowbit_and_say_so(name, tmp_path):
    save_tiny(tmp_path / "m", name)
    made = quantized(tmp_path / "m", tmp_path / "out", "w8a8kv4")
    assert not made.manifest["transformers"]["loads"]
    assert any("lowbit.load" in warning for warning in made.warnings)
    ids = tiny_ids()
    simulated = streamed_logits(tmp_path / "out", ids)
    model = lowbit.load(tmp_path / "out")
    assert_same(model(ids, use_cache=False).logits.detach(), simulated)
    # Token by token with a cache: each token's K and V have a range of their own, so nothing changes. In float64,
    # since another order of float32 sums would now and then move a value across a rounding boundary.
    model, cached = lowbit.load(tmp_path / "out", dtype=torch.float64), None
    whole = model(ids, use_cache=False).logits[:, -1].detach()
    for step in range(ids.shape[1]):
        with torch.no_grad():
            out = model(ids[:, step : step + 1], past_key_values=cached, use_cache=True)
        cached = out.past_key_values
    assert_same(out.logits[:, -1], whole)


@pytest.mark.parametrize("tied", [True, False])
def test_overrides_reach_linears_head_and_embeddings(tied, tmp_path):
    save_tiny(tmp_path / "m", "llama-odd" if tied else "llama")
    overrides = {"*.down_proj": "w8g16-sym", "*.0.self_attn.q_proj": "float", "lm_head": "w8"}
    for scheme, more in (("w4a16g16-sym", {}), ("w4a8", {}), ("w4a8", {"*embed_tokens": "w8"})):
        out = tmp_path / f"{scheme}{len(more)}"
        made = quantized(tmp_path / "m", out, scheme, overrides=overrides | more)
        assert "model.layers.0.self_attn.q_proj" in made.manifest["float"]
        assert "lm_head" in made.manifest["quantized"]
        assert ("model.embed_tokens" in made.manifest["quantized"]) == bool(more)
        ids = tiny_ids()
        simulated = streamed_logits(out, ids)
        assert_same(lowbit.load(out)(ids, use_cache=False).logits.detach(), simulated)
        assert made.manifest["transformers"]["loads"] == (not more)
        if not more:
            assert_same(stock_logits(out, ids), simulated)


def test_the_error_in_the_manifest_is_the_error_of_the_folder(tmp_path):

    save_tiny(tmp_path / "m", "llama", shards=True)
    made = quantized(tmp_path / "m", tmp_path / "out", "w4a8", "smoothquant+gptq")
    ids = lowbit.data.text.calibration(
        str(tmp_path / "m/calib.txt"), lowbit.checkpoints.resolve.load_tokenizer(tmp_path / "m"), 4, 24, 0
    ).ids
    float_model, ours = StreamedModel(tmp_path / "m"), StreamedModel(tmp_path / "out")
    x_fp, x_q = float_model.skeleton.start(ids), ours.skeleton.start(ids)
    for index in range(3):
        block, rounded = float_model.block(index), ours.block(index)
        x_fp = lowbit.models.block.run_all(block, x_fp)
        x_q = lowbit.models.block.run_all(rounded, x_q, rounded.quantized_params(), ours.scheme)
        assert relative_error(x_q, x_fp) == made.manifest["blocks"][index]["relative_error"]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lowbit-timing.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


CALL = """
import sys, lowbit
model, out, recipe, *settings = sys.argv[1:]
text = {"data": model + "/calib.txt", "samples": 4, "length": 24}
lowbit.quantize(model, out, scheme="w4a8", recipe=recipe, settings=settings, **text)
"""


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("smoothquant+gptq", []), ("affinequant", ["affinequant.epochs=2"])],
    ids=["fixed", "fit"],
)
def test_killed_at_any_point_and_started_again_gives_the_same_bytes(recipe, settings, tmp_path):
    save_tiny(tmp_path / "m", "qwen2")
    quantized(tmp_path / "m", tmp_path / "whole", "w4a8", recipe, settings=settings)
    wanted = folder_bytes(tmp_path / "whole")
    out = tmp_path / "killed"
    arguments = [sys.executable, "-c", CALL, str(tmp_path / "m"), str(out), recipe, *settings]
    for shard in ("model-rest.safetensors", "block-00001.safetensors"):
        process = subprocess.Popen(arguments, env={**os.environ, "LOWBIT_CACHE": str(tmp_path / "c")})
        while not (out / shard).exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "lowbit.json").exists() or process.returncode == 0
    (out / "block-00002.safetensors.partial").write_bytes(b"half")
    subprocess.run(arguments, check=True)
    assert folder_bytes(out) == wanted


def test_stopping_before_every_write_and_resuming_gives_the_same_bytes(tmp_path, monkeypatch):
    """Every file that a run writes is a place where it can die: die at each, resume, compare."""
    save_tiny(tmp_path / "m", "llama")
    quantized(tmp_path / "m", tmp_path / "whole", "w4a16g16-sym")
    wanted = folder_bytes(tmp_path / "whole")
    real, out = os.replace, tmp_path / "stopped"

    class Killed(BaseException):
        pass

    deaths = 0
    while True:
        left = [1 if deaths % 2 else 0]  # die at the first rename, or at the second: both sides of notes and shard

        def replace(source, target, left=left):
            if str(target).startswith(str(out)) and left[0] == 0:
                raise Killed
            left[0] -= str(target).startswith(str(out))
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            quantized(tmp_path / "m", out, "w4a16g16-sym")
            break
        except Killed:
            deaths += 1
            if deaths > 40:
                # Dying at the very first rename for ever makes no progress; let the last runs live longer.
                monkeypatch.setattr(os, "replace", real)
        if deaths > 40:
            quantized(tmp_path / "m", out, "w4a16g16-sym")
            break
    assert deaths > 5
    assert folder_bytes(out) == wanted


@pytest.mark.parametrize("name", ["llama-odd", "qwen3", "gemma3", "phi3-partial", "opt"])
def test_learned_maps_merge_into_a_folder_that_stock_transformers_loads(name, tmp_path):
    save_tiny(tmp_path / "m", name)
    for scheme in ("w4a4", "w3a16-asym"):
        if name == "opt" and scheme == "w4a4":
            continue  # compressed-tensors takes one range for all tokens of OPT's 2-D inputs
        out = tmp_path / scheme
        made = quantized(tmp_path / "m", out, scheme, "affinequant", settings=["affinequant.epochs=2"])
        assert made.manifest["transformers"]["loads"]
        assert made.manifest["online"] == []
        assert_same(stock_logits(out, tiny_ids()), streamed_logits(out, tiny_ids()))
        for row in made.manifest["blocks"]:
            record = row["steps"]["affinequant"]
            assert record["merge_error"] < 1e-9
            assert len(record["held_out"]) == 3


def test_a_finished_run_is_not_done_again(tmp_path, monkeypatch):
    save_tiny(tmp_path / "m", "llama")
    first = quantized(tmp_path / "m", tmp_path / "out", "w4a16g16-sym")
    monkeypatch.setattr("lowbit.pipeline.runner.Walk.walk", lambda *a: pytest.fail("ran again"))
    again = quantized(tmp_path / "m", tmp_path / "out", "w4a16g16-sym")
    assert again.manifest == first.manifest


def test_timing_has_the_seconds_and_the_memory_of_every_block(tmp_path):
    save_tiny(tmp_path / "m", "llama")
    (tmp_path / "w2.yaml").write_text("steps: [rtn]\nwindow: 2\n")
    made = quantized(tmp_path / "m", tmp_path / "out", "w4a4", str(tmp_path / "w2.yaml"))
    blocks = read_json(tmp_path / "out" / "lowbit-timing.json")["blocks"]
    assert [block["block"] for block in blocks] == [0, 1, 2]
    assert 0 < sum(block["seconds"] for block in blocks) < made.seconds
    assert blocks[0]["seconds"] == blocks[1]["seconds"]
    peaks = [block["peak_memory_bytes"] for block in blocks]
    assert 0 < peaks[0] <= peaks[1] <= peaks[2] <= made.peak_memory_bytes


def test_a_window_of_blocks_gives_the_same_codes_as_single_blocks_for_rtn(tmp_path):
    save_tiny(tmp_path / "m", "llama")
    (tmp_path / "w2.yaml").write_text("steps: [rtn]\nwindow: 2\n")
    one = quantized(tmp_path / "m", tmp_path / "one", "w4a16g16-sym")
    two = quantized(tmp_path / "m", tmp_path / "two", "w4a16g16-sym", str(tmp_path / "w2.yaml"))
    shards = [f"block-0000{i}.safetensors" for i in range(3)]
    assert [(one.out / s).read_bytes() for s in shards] == [(two.out / s).read_bytes() for s in shards]


def test_manifest_holds_what_is_needed_to_repeat_the_run(tmp_path):
    save_tiny(tmp_path / "m", "llama")
    made = quantized(tmp_path / "m", tmp_path / "out", "w4a16g16-sym", "gptq", settings=["gptq.damping=0.02"], seed=3)
    manifest = read_json(tmp_path / "out/lowbit.json")
    identity = manifest["identity"]
    assert identity["recipe"]["steps"][0]["gptq"]["damping"] == 0.02
    assert identity["seed"] == 3
    assert len(identity["data"]["hash"]) == 64
    assert torch.__version__.startswith(manifest["versions"]["torch"].split("+")[0])
    assert made.bits_per_weight == 4 + 16 / 16
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out/.run").exists()
