"""Mixtures that no family declares: found, proven, quantized, loaded by stock transformers, resumed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import _get_current_function_mode_stack
from transformers import AutoModelForCausalLM

import any_mixtures
import lowbit
import tiny
from any_mixtures import NAMES, TOGETHER, tiny_mixture
from lowbit.errors import LowbitError
from lowbit.methods.statistics import input_statistics
from lowbit.models.discovery.discover import discover
from lowbit.models.equivalence import move
from lowbit.models.families import architecture_of
from lowbit.models.forward import observe, relative_error, run, run_all
from lowbit.models.listed_experts import ListedExperts
from lowbit.pipeline.inspect import inspect_model
from lowbit.runs.manifest import MANIFEST
from runs import folder_bytes, killed_and_resumed, streamed_logits
from test_equivalence import random_maps
from tiny import block_of, params_of, save_tiny, skeleton_of, tiny_ids

IDS = tiny_ids(2, 16)
FAST = ("gpt_oss", "nemotron_h", "qwen2_moe", "looped")  # stored together, without a gate, beside a shared one
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.heavy) for name in NAMES]


@pytest.fixture(autouse=True)
def known(monkeypatch, tmp_path_factory):
    """The types are known to the helpers; what is found in one test is known to the next."""
    any_mixtures.declare(monkeypatch)
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def mixtures_of(model):
    """Indices of the layers with experts."""
    return [index for index, kind in enumerate(architecture_of(model.config).layers) if kind.experts is not None]


def logits_of(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", EACH)
def test_the_walk_is_the_model_bit_for_bit(name):
    model = tiny_mixture(name)
    skeleton = skeleton_of(model)
    assert mixtures_of(model), "no experts are found"
    assert bool(skeleton.architecture.kept()) == (name == "jetmoe"), "of two mixtures of a layer one stays float"
    x = skeleton.embed(IDS)
    for index in range(len(skeleton.layers)):
        x = run_all(skeleton.block(index, params_of(model, skeleton, index)), x)
    assert torch.equal(skeleton.logits(IDS, x), logits_of(model))


@pytest.mark.parametrize("name", EACH)
def test_a_random_map_across_every_proven_edge_leaves_the_output(name):
    model = tiny_mixture(name)
    index = mixtures_of(model)[0]
    block, x = block_of(model, start=index, dtype=torch.float64)
    kind, wanted = block.kinds[0], run(block, x)
    kinds = [edge.kind for edge in block.edges()]
    ends = [tuple(dst.module for dst in edge.dst) for edge in block.edges() if edge.kind == "norm"]
    inner = {f"{index}.{kind.experts.name(n, one)}" for n in range(kind.experts.count) for one in kind.experts.reads}
    assert any(inner < set(own) for own in ends), "the norm's edge ends in the router and in all experts"
    experts = [
        e
        for e in block.edges()
        if e.kind == "channels" and kind.expert_of(e.src.module.partition(".")[2]) is not None
    ]
    assert len(experts) == (0 if name == "gpt_oss" else kind.experts.count), kinds
    generator = torch.Generator().manual_seed(0)
    for edge in block.edges():
        # Routers, norms and delta nets compute in float32, whatever they are given.
        close = 1e-10 if edge in experts else 1e-5
        for map in random_maps(edge, generator):
            moved = move(block, edge, map)
            assert float((run(block, x, moved) - wanted).abs().max() / wanted.abs().max()) < close, edge
            half = {**moved, edge.src.parameter: block.params[edge.src.parameter]}
            assert float((run(block, x, half) - wanted).abs().max() / wanted.abs().max()) > 1e-4, edge


def test_what_is_found_and_what_is_kept_give_the_same_run():
    """Building the small model must not choose the implementation of attention for the run that asked first."""
    config = any_mixtures.LoopedConfig(**any_mixtures.LISTED, architectures=["LoopedForCausalLM"])
    before = str(vars(config))
    discover(config)
    assert str(vars(config)) == before


def run_of(folder, name, scheme="w4a16g16-sym", recipe="rtn", **more):
    """A run of a tiny mixture."""
    if not (folder / "model").exists():
        save_tiny(folder / "model", name)
    text = str(folder / "model" / "calib.txt")
    given = {"data": text, "samples": 2, "length": 24, "expert_tokens": 4, **more}
    lowbit.quantize(str(folder / "model"), folder / "run", scheme=scheme, recipe=recipe, **given)
    return folder / "run"


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
def test_the_folder_computes_what_was_simulated(name, tmp_path):
    folder = run_of(tmp_path, name, recipe="gptq")
    told, simulated = json.loads((folder / MANIFEST).read_text()), streamed_logits(folder, IDS)
    model = tiny_mixture(name)
    assert 0 < relative_error(simulated, logits_of(model)) < 0.5
    loaded = lowbit.load(folder)
    assert torch.equal(logits_of(loaded), simulated)
    experts = [one for one in told["quantized"] if architecture_of(model.config).is_experts(one)]
    kind = architecture_of(model.config).layers[mixtures_of(model)[0]].experts
    assert len(experts) == len(mixtures_of(model)) * kind.count * len(kind.linears)
    assert [len(row["routing"]) for row in told["blocks"]].count(kind.count) == len(mixtures_of(model))
    if name in TOGETHER:
        assert not told["transformers"]["loads"]
        assert "stores the experts of a layer together" in told["transformers"]["why_not"]
        return
    assert told["transformers"]["loads"], told["transformers"]["why_not"]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock.set_experts_implementation("eager")
    assert torch.equal(logits_of(stock), simulated)


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_ends_with_the_bytes_of_one_that_never_stopped(name, tmp_path, monkeypatch):
    whole = run_of(tmp_path / "whole", name, "w4a8")
    resumed = killed_and_resumed(lambda: run_of(tmp_path / "killed", name, "w4a8"), monkeypatch)
    assert folder_bytes(resumed) == folder_bytes(whole)


def shun_the_last(model, router="gate"):
    """Rows of the routers are ``w, -w, u, -u, 0``: the last of five experts is never among the best two."""
    for layer in model.model.layers:
        weight = getattr(layer.mlp, router).weight.data
        weight[1], weight[3], weight[4] = -weight[0], -weight[2], 0


@pytest.mark.heavy
def test_experts_in_a_list_are_seen_as_experts(tmp_path):
    model = save_tiny(tmp_path / "model", "listed")
    shun_the_last(model)
    model.save_pretrained(tmp_path / "model")
    kind = architecture_of(model.config).layers[0]
    assert kind.listed == ListedExperts("mlp.experts", 5, (("w1", "w3"), ("w2",)))
    assert kind.routers == {"mlp.gate"}
    assert kind.expert_of("mlp.experts.3.w2") == 3
    folder = run_of(tmp_path, "listed", recipe="gptq")
    told, simulated = json.loads((folder / MANIFEST).read_text()), streamed_logits(folder, IDS)
    assert told["transformers"]["loads"]
    assert "model.layers.0.mlp.gate" in told["floats"]
    for row in told["blocks"]:
        assert len(row["routing"]) == 5
        assert sum(row["routing"]) == 2 * 2 * 24
        assert row["routing"][4] == 0
        assert any("gptq: fewer than 4 calibration tokens" in note and "4 (0)" in note for note in row["notes"])
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits_of(stock), simulated)
    assert torch.equal(logits_of(lowbit.load(folder)), simulated)
    assert 0 < relative_error(simulated, logits_of(model)) < 0.5


def test_statistics_of_listed_experts_are_of_the_tokens_that_reach_them(monkeypatch):
    model = tiny.tiny_model("listed")
    block, x = block_of(model, start=0)
    seen = []
    hook = model.model.layers[0].mlp.experts[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tiny_ids(), use_cache=False)
    hook.remove()
    own = input_statistics(block, x, ["0.mlp.experts.1.w1"], ("gram",))["0.mlp.experts.1.w1"]
    assert 0 < own.count == len(seen[0]) < x.shape[0] * x.shape[1]
    assert torch.allclose(own["gram"], seen[0].T @ seen[0], atol=1e-4)


def test_what_needs_the_tokens_of_listed_experts_is_refused_in_one_line(tmp_path):
    save_tiny(tmp_path / "model", "listed")
    with pytest.raises(LowbitError, match="--all-experts"):
        run_of(tmp_path, "listed", all_experts=True)
    assert not (tmp_path / "run").exists()


def test_statistics_of_experts_of_own_code_are_of_the_tokens_that_reach_them():
    model = tiny.tiny_model("looped")
    block, x = block_of(model, start=0)
    mixture, tokens = model.model.layers[0].mlp, []
    observe(block, x, {"0.mlp.router": lambda value: tokens.append(value.flatten(0, -2))})
    own = input_statistics(block, x, ["0.mlp.1.up", "0.mlp.1.down"], ("gram",))
    with torch.no_grad():
        every = torch.cat(tokens)
        reached = every[(every @ mixture.router.weight.T).topk(2).indices.eq(1).any(-1)]
        inner = torch.nn.functional.silu(reached @ mixture.gate[1]) * (reached @ mixture.up[1])
    assert 0 < own["0.mlp.1.up"].count == len(reached) < len(every)
    for name, wanted in (("up", reached), ("down", inner)):
        gram = own[f"0.mlp.1.{name}"]["gram"]
        assert torch.allclose(gram, wanted.T @ wanted, atol=1e-5 * float(gram.abs().max())), name


def test_an_expert_of_own_code_that_no_token_reaches_is_quantized_and_reported(tmp_path):
    model = save_tiny(tmp_path / "model", "looped")
    shun_the_last(model, "router")
    model.save_pretrained(tmp_path / "model")
    folder = run_of(tmp_path, "looped", recipe="gptq")
    told = json.loads((folder / MANIFEST).read_text())
    assert "model.layers.1.mlp.4.down" in told["quantized"]
    for row in told["blocks"]:
        assert sum(row["routing"]) == 2 * 2 * 24
        assert row["routing"][4] == 0
        assert any("gptq: fewer than 4 calibration tokens" in note and "4 (0)" in note for note in row["notes"])


@pytest.mark.heavy
def test_rows_of_zeros_are_tokens_that_do_not_reach_an_expert():
    """Llama 4 sends every token to every expert, times 0 where the router sends it elsewhere."""
    model = tiny.tiny_model("llama4_text")
    block, x = block_of(model, start=1)
    chosen = []
    run(block, x, taps={"1.feed_forward.experts:routing": chosen.append})
    counts = torch.bincount(torch.cat(chosen).flatten(), minlength=4)
    assert counts.sum() == x.shape[0] * x.shape[1], "each token reaches one expert"
    for number, count in enumerate(counts.tolist()):
        name = f"1.feed_forward.experts.{number}.up_proj"
        assert input_statistics(block, x, [name], ("gram",))[name].count == count


@pytest.mark.parametrize("given", [{"all_experts": True}, {"recipe": "gptq", "settings": ["gptq.target=output"]}])
def test_what_needs_all_tokens_of_experts_of_own_code_is_refused_in_one_line(given, tmp_path):
    save_tiny(tmp_path / "model", "looped")
    with pytest.raises(LowbitError, match=r"--all-experts|cannot be paired token by token"):
        run_of(tmp_path, "looped", **given)
    assert not (tmp_path / "run" / MANIFEST).exists()


def stop(module, args):
    raise RuntimeError("stop")


def test_a_loaded_model_quantizes_the_inputs_of_experts_of_own_code_and_can_be_copied(tmp_path):
    folder = run_of(tmp_path, "looped", "w4a8", "awq+gptq")
    loaded, simulated = lowbit.load(folder), streamed_logits(folder, IDS)
    assert torch.equal(logits_of(loaded), simulated)
    assert torch.equal(logits_of(copy.deepcopy(loaded)), simulated)
    hook = loaded.model.layers[1].mlp.router.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        loaded(IDS)
    hook.remove()
    assert not _get_current_function_mode_stack(), "an error within a layer leaves nothing behind"
    assert torch.equal(logits_of(loaded), simulated)
    for layer in loaded.model.layers:
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()
    assert relative_error(logits_of(loaded), simulated) > 1e-6, "with float inputs it is another model"


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["affinequant", "awq+gptq", "lowrank"])
@pytest.mark.parametrize("name", any_mixtures.OWN_CODE)
def test_methods_run_on_experts_of_own_code(name, recipe, tmp_path):
    settings = [f"{step}.epochs=1" for step in ("affinequant", "lowrank") if step in recipe]
    folder = run_of(tmp_path, name, "w4a8", recipe, settings=settings)
    simulated = streamed_logits(folder, IDS)
    assert torch.equal(logits_of(lowbit.load(folder)), simulated)
    assert 0 < relative_error(simulated, logits_of(tiny_mixture(name))) < 0.5


def test_experts_that_no_product_is_seen_of_stay_float_by_name(tmp_path):
    model = save_tiny(tmp_path / "model", "summed")
    kept = ("mlp.gate", "mlp.up", "mlp.down")
    full = [f"model.layers.{layer}.{name}" for layer in range(2) for name in kept]
    architecture = architecture_of(model.config)
    assert [kind.kept for kind in architecture.layers] == [kept, kept]
    assert architecture.layers[1].experts is None
    assert architecture.layers[1].routers == {"mlp.router"}
    facts = inspect_model(str(tmp_path / "model"), "w4a16g16-sym", "gptq", samples=2, length=16)
    assert facts["experts_in_float"] == full
    assert facts["kinds"][0]["kept"] == list(kept)
    folder = run_of(tmp_path, "summed", recipe="gptq")
    told = json.loads((folder / MANIFEST).read_text())
    assert told["kept_experts"] == full
    assert "model.layers.1.mlp.router" in told["floats"]
    assert all(any("experts: these experts stay float" in note for note in row["notes"]) for row in told["blocks"])
    assert all(name in (folder / "README.md").read_text() for name in full)
    lowbit.report([folder], out=tmp_path / "report.html")
    assert full[0] in (tmp_path / "report.html").read_text()
    shards = load_file(folder / "block-00001.safetensors")
    assert all(torch.equal(shards[name], model.get_parameter(name)) for name in full[3:])
    stored = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1)
    quantized = told["bits_per_weight"] * (
        count := sum(model.get_parameter(f"{n}.weight").numel() for n in told["quantized"])
    )
    assert told["model_bits_per_weight"] == pytest.approx((quantized + 16 * (stored - count)) / stored)
    assert torch.equal(logits_of(lowbit.load(folder)), streamed_logits(folder, IDS))
    with pytest.raises(LowbitError, match="experts outside transformers' registry are not exported"):
        lowbit.export(folder, "gguf", out=tmp_path / "out")
