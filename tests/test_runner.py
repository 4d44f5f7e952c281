"""From a checkpoint to a run folder: what was evaluated is what is shipped, in every reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.json_file import read_json
from lowbit.methods import gptq
from lowbit.models.forward import relative_error, run_all, run_quantized
from lowbit.runs.streamed_model import StreamedModel
from tiny import NAMES, save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs by the dozen

# Two correct computations of one function in float32 differ by rounding; logits here are of order 10.
CLOSE = 1e-5
# Two layers have one of each kind, and show what one does to the next.
SHORT = {"num_hidden_layers": 2}


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
    model = save_tiny(tmp_path / "m", name, **SHORT)
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
        loads = made.manifest.transformers.loads
        assert loads == (not (name == "opt" and scheme == "w4a8"))
        if loads:
            assert_same(stock_logits(out, ids), simulated)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A model of one layer, for what schemes differ in."""
    folder = tmp_path_factory.mktemp("one") / "m"
    save_tiny(folder, "llama-odd", num_hidden_layers=1)
    return folder


@pytest.mark.parametrize(
    "scheme",
    [f"w{bits}a16{group}-{kind}" for bits in range(2, 9) for group in ("", "g16") for kind in ("sym", "asym")]
    + [f"w4a{bits}{group}-{kind}" for bits in (4, 6, 8) for group in ("", "g16") for kind in ("sym", "asym")],
)
def test_every_scheme_loads_in_stock_transformers(scheme, one_layer, tmp_path):
    made = quantized(one_layer, tmp_path / "out", scheme)
    assert made.manifest.transformers.loads
    assert_same(stock_logits(tmp_path / "out", tiny_ids()), streamed_logits(tmp_path / "out", tiny_ids()))


@pytest.mark.parametrize("name", ["llama", "llama-odd", "gemma3", "opt"])
def test_kv_schemes_load_with_lowbit_and_say_so(name, tmp_path):
    save_tiny(tmp_path / "m", name, **SHORT)
    made = quantized(tmp_path / "m", tmp_path / "out", "w8a8kv4")
    assert not made.manifest.transformers.loads
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
    save_tiny(tmp_path / "m", "llama-odd" if tied else "llama", **SHORT)
    overrides = {"*.down_proj": "w8g16-sym", "*.0.self_attn.q_proj": "float", "lm_head": "w8"}
    for scheme, more in (("w4a16g16-sym", {}), ("w4a8", {}), ("w4a8", {"*embed_tokens": "w8"})):
        out = tmp_path / f"{scheme}{len(more)}"
        made = quantized(tmp_path / "m", out, scheme, overrides=overrides | more)
        assert "model.layers.0.self_attn.q_proj" in made.manifest.floats
        assert "lm_head" in made.manifest.quantized
        assert ("model.embed_tokens" in made.manifest.quantized) == bool(more)
        ids = tiny_ids()
        simulated = streamed_logits(out, ids)
        assert_same(lowbit.load(out)(ids, use_cache=False).logits.detach(), simulated)
        assert made.manifest.transformers.loads
        assert_same(stock_logits(out, ids), simulated)


def test_the_error_in_the_manifest_is_the_error_of_the_folder(tmp_path):
    save_tiny(tmp_path / "m", "llama", shards=True)
    made = quantized(tmp_path / "m", tmp_path / "out", "w4a8", "smoothquant+gptq")
    ids = lowbit.data.text.calibration(
        str(tmp_path / "m/calib.txt"), lowbit.checkpoints.resolve.load_tokenizer(tmp_path / "m"), 4, 24, 0
    ).ids
    float_model, ours = StreamedModel(tmp_path / "m"), StreamedModel(tmp_path / "out")
    x_fp, x_q = float_model.skeleton.embed(ids), ours.skeleton.embed(ids)
    for index in range(3):
        block, rounded = float_model.block(index), ours.block(index)
        x_fp = run_all(block, x_fp)
        x_q = run_quantized(rounded, x_q)
        # A run adds up the squares of its micro-batches.
        stated = made.manifest.blocks[index].relative_error
        assert relative_error(x_q, x_fp) == pytest.approx(stated, rel=1e-12)


@pytest.mark.parametrize("name", ["llama-odd", "qwen3", "gemma3", "phi3-partial", "opt"])
def test_learned_maps_merge_into_a_folder_that_stock_transformers_loads(name, tmp_path):
    save_tiny(tmp_path / "m", name, **SHORT)
    for scheme in ("w4a4", "w3a16-asym"):
        if name == "opt" and scheme == "w4a4":
            continue  # compressed-tensors takes one range for all tokens of OPT's 2-D inputs
        out = tmp_path / scheme
        made = quantized(tmp_path / "m", out, scheme, "affinequant", settings=["affinequant.epochs=2"])
        assert made.manifest.transformers.loads
        assert made.manifest.runtime_ops == {}
        assert_same(stock_logits(out, tiny_ids()), streamed_logits(out, tiny_ids()))
        for row in made.manifest.blocks:
            record = row.steps["affinequant"]
            assert record["merge_error"] < 1e-9
            assert len(record["held_out"]) == 3


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


def test_a_note_belongs_to_the_layer_that_it_names(tmp_path, monkeypatch):
    save_tiny(tmp_path / "m", "llama")
    (tmp_path / "w2.yaml").write_text("steps: [gptq]\nwindow: 2\n")
    exact = gptq.input_statistics

    def indefinite(block, x, linears, want, *args, **kwargs):
        seen = exact(block, x, linears, want, *args, **kwargs)
        if linears == ["1.mlp.down_proj"]:
            gram = torch.eye(96)
            gram[0, 1] = gram[1, 0] = 1.5  # eigenvalues 2.5 and -0.5
            return {linears[0]: replace(seen[linears[0]], values=dict.fromkeys(want, gram))}
        return seen

    monkeypatch.setattr(gptq, "input_statistics", indefinite)
    made = quantized(
        tmp_path / "m", tmp_path / "out", "w4a16g16-sym", str(tmp_path / "w2.yaml"), settings=["gptq.shrinkage=0"]
    )
    notes = [row.notes for row in made.manifest.blocks]
    assert notes == [[], ["gptq: damping raised from 0.01 to 1 for 1.mlp.down_proj"], []]


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
