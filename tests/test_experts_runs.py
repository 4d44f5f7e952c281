"""Whole runs of mixtures of experts: every method, the folder in stock transformers, resumed."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowbit
import mixtures
from lowbit.errors import LowbitError
from lowbit.models.block import Block
from lowbit.models.forward import relative_error
from lowbit.pipeline.recipe import load_recipe, recipe_from_dict
from lowbit.pipeline.runner import Walk
from lowbit.runs.manifest import MANIFEST
from lowbit.runs.streamed_model import StreamedModel
from mixtures import shun_the_last, tiny_mixture, with_a_cold_expert
from runs import folder_bytes, killed_and_resumed, streamed_logits
from tiny import save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs by the dozen

IDS = tiny_ids(2, 16)
SCHEMES = {
    "rtn": "w4a16g16-sym",
    "gptq": "w3a16g16-asym",
    "awq+gptq": "w4a8",
    "smoothquant": "w8a8",
    "affinequant": "w4a8",
    "omniquant": "w4a4",
    "qllm": "w4a4",
}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The mixtures by hand are known."""
    mixtures.declare(monkeypatch)


def run_of(folder, name, scheme, recipe="rtn", model=None, **more):
    """A run of a tiny mixture, and the mixture."""
    made = save_tiny(folder / "model", name)
    if model is not None:
        model.save_pretrained(folder / "model")
    else:
        made.set_experts_implementation("eager")
    steps = [step for step, _ in (load_recipe(recipe) if isinstance(recipe, str) else recipe).steps]
    settings = [s for s in ("affinequant.epochs=1", "lowrank.epochs=1") if s.split(".")[0] in steps]
    text = str(folder / "model" / "calib.txt")
    given = {"scheme": scheme, "recipe": recipe, "data": text, "samples": 4, "length": 24, "settings": settings}
    lowbit.quantize(str(folder / "model"), folder / "run", **{"expert_tokens": 8, **given, **more})
    return folder / "run", model or made


def logits_of(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("recipe", SCHEMES)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_methods_run_and_the_folder_computes_what_was_simulated(name, recipe, tmp_path):
    run, model = run_of(tmp_path, name, SCHEMES[recipe], recipe)
    simulated = streamed_logits(run, IDS)
    assert torch.equal(logits_of(lowbit.load(run)), simulated)
    assert 0 < relative_error(simulated, logits_of(model)) < 0.5


def test_the_whole_model_is_tuned_through_its_experts(tmp_path):
    recipe = recipe_from_dict({"steps": ["gptq", {"tune": {"epochs": 1, "rank": 2}}]}, "tuned")
    run, model = run_of(tmp_path, "qwen3-moe", "w4a16g16-sym", recipe)
    simulated = streamed_logits(run, IDS)
    assert torch.equal(logits_of(lowbit.load(run)), simulated)
    assert 0 < relative_error(simulated, logits_of(model)) < 0.5


@pytest.mark.parametrize("recipe", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("name", mixtures.handmade.MIXTURES)
def test_mixtures_of_other_shapes_run(name, recipe, tmp_path):
    run, model = run_of(tmp_path, name, "w4a8", recipe)
    simulated = streamed_logits(run, IDS)
    assert torch.equal(logits_of(lowbit.load(run)), simulated)
    assert 0 < relative_error(simulated, logits_of(model)) < 0.5


@pytest.mark.parametrize("scheme", ["w4a16g16-sym", "w3a16-sym", "w8a16-sym"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "qwen2-moe"])
def test_stock_transformers_loads_experts_with_the_simulated_logits(name, scheme, tmp_path):
    run, _ = run_of(tmp_path, name, scheme, "gptq")
    assert json.loads((run / MANIFEST).read_text())["transformers"]["loads"]
    stock = AutoModelForCausalLM.from_pretrained(run)
    stock.set_experts_implementation("eager")
    assert torch.equal(logits_of(stock), streamed_logits(run, IDS))


def test_on_disk_an_expert_has_its_own_linears_under_the_names_that_stock_converts(tmp_path):
    run, _ = run_of(tmp_path, "mixtral", "w4a16g32-sym")
    names = set(load_file(run / "block-00001.safetensors"))
    own = {n.rpartition(".")[0] for n in names if ".experts." in n}
    assert own == {f"model.layers.1.mlp.experts.{e}.{w}" for e in range(4) for w in ("w1", "w2", "w3")}
    assert "model.layers.1.mlp.gate.weight" in names


REASONS = {
    "inputs": ("w8a8", {}, "transformers computes experts with float inputs"),
    "zero points": ("w4a16g16-asym", {}, "zero points of experts are not read"),
    "formats": ("w4a16g16-sym", {"*.experts.0.*": "w8-sym"}, "experts in several formats do not load"),
    "floats": ("w4a16g16-sym", {"*.experts.*": "float"}, "float experts beside quantized linears do not load"),
    "router": ("w4a16g16-sym", {"*.mlp.gate": "w8-sym"}, "transformers has no quantized linear in its place"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_stock_transformers_cannot_load_is_said_and_lowbit_loads_it(reason, tmp_path):
    scheme, overrides, why = REASONS[reason]
    run, _ = run_of(tmp_path, "qwen3-moe", scheme, overrides=overrides)
    told = json.loads((run / MANIFEST).read_text())
    assert not told["transformers"]["loads"]
    assert why in told["transformers"]["why_not"]
    routers = {"model.layers.0.mlp.gate", "model.layers.2.mlp.gate"}
    assert routers <= set(told["quantized" if reason == "router" else "floats"])
    assert torch.equal(logits_of(lowbit.load(run)), streamed_logits(run, IDS))


def test_codes_of_experts_that_the_library_stores_together_need_lowbit(tmp_path):
    run, _ = run_of(tmp_path, "gpt-oss", "w4a16g16-sym")
    told = json.loads((run / MANIFEST).read_text())["transformers"]
    assert not told["loads"]
    assert "transformers stores the experts of a layer together" in told["why_not"]
    assert torch.equal(logits_of(lowbit.load(run)), streamed_logits(run, IDS))


def test_a_source_with_experts_stored_together_gives_the_same_run(tmp_path):
    run, model = run_of(tmp_path / "apart", "qwen3-moe", "w4a16g16-sym")
    other = tmp_path / "together"
    save_tiny(other / "model", "qwen3-moe")
    save_file(model.state_dict(), other / "model/model.safetensors", metadata={"format": "pt"})
    text = str(other / "model/calib.txt")
    lowbit.quantize(
        str(other / "model"), other / "run", scheme="w4a16g16-sym", recipe="rtn", data=text, samples=4, length=24
    )
    shards = [f"block-0000{i}.safetensors" for i in range(3)]
    assert all((run / shard).read_bytes() == (other / "run" / shard).read_bytes() for shard in shards)
    float_model = torch.cat([logits for _, logits in StreamedModel(other / "model").logits(IDS)])
    assert torch.equal(float_model, logits_of(model))


def test_an_expert_that_no_token_reaches_is_quantized_and_reported(tmp_path):
    model = with_a_cold_expert("qwen3-moe")
    run, _ = run_of(tmp_path, "qwen3-moe", "w4a16g16-sym", "gptq", model=model)
    told = json.loads((run / MANIFEST).read_text())
    routing = [row["routing"] for row in told["blocks"]]
    assert [len(tokens) for tokens in routing] == [5, 0, 5]
    assert [sum(tokens) for tokens in routing] == [2 * 4 * 24, 0, 2 * 4 * 24]
    assert routing[0][4] == routing[2][4] == 0
    notes = told["blocks"][2]["notes"]
    assert any(
        "gptq: fewer than 8 calibration tokens reach these experts" in note and "4 (0)" in note for note in notes
    )
    assert torch.equal(logits_of(lowbit.load(run)), streamed_logits(run, IDS))
    page = tmp_path / "report.html"
    lowbit.report([run], out=page)
    text = page.read_text()
    assert "1 of 5 experts below 8 tokens" in text
    assert "calibration tokens that reach each expert" in text
    every = json.loads(
        (
            run_of(tmp_path / "all", "qwen3-moe", "w4a16g16-sym", "gptq", model=model, all_experts=True)[0] / MANIFEST
        ).read_text()
    )
    assert not any(row["notes"] for row in every["blocks"])
    assert every["identity"]["all_experts"]
    assert every["request"]["all_experts"]


@pytest.mark.parametrize("target", ["gptq", "awq", "vllm"])
def test_exports_of_mixtures_are_refused_before_any_work(target, tmp_path):
    run, _ = run_of(tmp_path, "mixtral", "w4a16g32-sym")
    with pytest.raises(LowbitError, match="mixtures of experts are exported to gguf alone"):
        lowbit.export(run, target, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_run_ends_with_the_bytes_of_one_that_never_stopped(tmp_path, monkeypatch):
    whole, _ = run_of(tmp_path / "whole", "qwen3-moe", "w4a8", "gptq")
    resumed = killed_and_resumed(lambda: run_of(tmp_path / "killed", "qwen3-moe", "w4a8", "gptq")[0], monkeypatch)
    assert folder_bytes(resumed) == folder_bytes(whole)


def test_nothing_of_a_layer_is_left_when_the_next_is_read(tmp_path, monkeypatch):
    left, real = [], Walk._window

    def alive():
        objects = gc.get_objects()
        # By type: some lazy modules warn when they are asked for their class.
        tensors = [o for o in objects if issubclass(type(o), torch.Tensor)]
        large = [value for value in tensors if value.device.type == "cpu" and value.ndim == 2]
        return sum(type(o) is Block for o in objects), sum(value.numel() for value in large)

    def window(self, *given):
        out = real(self, *given)
        left.append(alive())
        return out

    monkeypatch.setattr(Walk, "_window", window)
    gc.collect()
    gc.disable()
    others, _ = alive()  # what other tests keep
    try:
        run_of(tmp_path, "mixtral", "w4a8", "gptq")
    finally:
        gc.enable()
    assert [blocks - others for blocks, _ in left] == [0, 0, 0]
    assert left[1][1] == left[2][1], "matrices of a layer are alive"


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path):
    save_tiny(tmp_path, "qwen3-moe")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LowbitError, match=r"has no tensor 'model.layers.2.mlp.experts.3.up_proj.weight'"):
        StreamedModel(tmp_path)


def test_experts_stored_together_that_are_fewer_than_the_config_says_are_refused(tmp_path):
    model = save_tiny(tmp_path, "qwen3-moe")
    tensors = {**model.state_dict()}
    name = "model.layers.2.mlp.experts.down_proj"
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LowbitError, match=r"down_proj' in .* has shape .*they do not match"):
        StreamedModel(tmp_path)


@pytest.mark.parametrize("tokens", [-1])
def test_a_limit_below_zero_is_refused(tokens, tmp_path):
    with pytest.raises(LowbitError, match=r"--expert-tokens -1 given; it must be 0 or more"):
        lowbit.quantize(str(tmp_path), tmp_path / "run", expert_tokens=tokens)


def test_the_tiny_model_of_five_experts_shuns_the_last():
    model = tiny_mixture("qwen3-moe", num_experts=5)
    shun_the_last(model)
    seen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    logits_of(model)
    assert 4 not in seen[0]
