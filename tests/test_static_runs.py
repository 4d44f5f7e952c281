"""Runs with static inputs: what is calibrated, stored and read back, and what such a run refuses."""

from __future__ import annotations

import pickle
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.writing import write_json, write_tensors
from lowbit.errors import LowbitError
from lowbit.methods import METHODS, RTN
from lowbit.methods.gptq import GPTQ
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.options import with_options
from lowbit.models.block import Block, Calib
from lowbit.models.forward import observe, run_all
from lowbit.pipeline import block_writing
from lowbit.pipeline.recipe import Recipe, recipe_from_dict
from lowbit.quant.range_estimators import RangeEstimator
from lowbit.quant.scheme_names import parse_scheme
from lowbit.reports.command import command
from lowbit.runs.plan import make_plan
from runs import folder_bytes, quantize_tiny, streamed_logits
from tiny import block_of, planned, save_tiny, skeleton_of, tiny_ids, tiny_model

MIN_MAX = RangeEstimator("min-max")
STATIC = ["w8a8-static", "w4a8g16-sym-static", "w4a16-static", "nvfp4"]
IDS = tiny_ids(2, 20)


def given(scheme: str, family: str = "llama-odd", layers: int = 1) -> tuple[Block, Calib]:
    block, x = block_of(tiny_model(family), 1, layers)
    block = planned(block, scheme)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    return block, Calib(x, x + 0.02 * x.std() * noise, run_all(block, x), input_range=MIN_MAX)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "model"
    save_tiny(folder, "llama", num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def run(model: Path) -> Path:
    return quantize_tiny(model, model.parent / "run", "w8a8-static", "gptq").out


# Calibration.


def test_a_range_covers_the_quantized_stream_and_is_shared_by_the_readers_of_one_input() -> None:
    block, calib = given("w8a8-static")
    found = with_input_ranges(block, calib)
    assert set(found.input_qparams) == set(block.linears())
    for group in block.linear_groups():
        assert len({id(found.input_qparams[name]) for name in group}) == 1
        parts: list[torch.Tensor] = []
        observe(block, calib.x_q, {group[0]: parts.append})
        values = torch.cat(parts)
        format = block.input_format(group[0])
        wanted = format.qparams(values.amin().reshape(1), values.amax().reshape(1))
        assert torch.equal(found.input_qparams[group[0]].scale, wanted.scale)
        assert torch.equal(found.input_qparams[group[0]].zero, wanted.zero)


@pytest.mark.parametrize("step", [RTN(), GPTQ()], ids=["rtn", "gptq"])
def test_codes_are_chosen_for_the_input_that_ships(step: RTN | GPTQ) -> None:
    block, calib = given("w4a8-static")
    done = step(block, calib)
    again = step(replace(block, input_qparams=done.input_qparams), calib)
    for name, q in done.qweights.items():
        assert torch.equal(again.qweights[name].codes, q.codes)
    figures = done.record[1]["input_ranges"]
    assert figures.keys() == set(block.linears())
    assert all(own["low"] <= 0 <= own["high"] and own["clipped"] < 0.02 for own in figures.values())


def test_ranges_that_are_there_stay() -> None:
    block, calib = given("w8a8-static")
    before = with_input_ranges(block, calib)
    assert with_input_ranges(before, replace(calib, x_q=10 * calib.x_q)) is before
    assert RTN()(before, calib).input_qparams == before.input_qparams


def test_a_learned_step_trains_the_ends_of_the_range() -> None:
    block, calib = given("w4a8-static")
    step = with_options(METHODS["affinequant"](), epochs=2, start="given")
    learned, fixed = (with_options(step, clip=clip)(block, calib).input_qparams for clip in (True, False))
    start = with_input_ranges(block, calib).input_qparams
    assert all(torch.equal(fixed[name].scale, start[name].scale) for name in start)
    moved = [not torch.equal(learned[name].scale, start[name].scale) for name in start]
    assert all(moved)
    assert not learned[block.linears()[0]].scale.requires_grad


def test_a_step_that_moves_maps_behind_a_learned_one_gets_fresh_ranges(model: Path, tmp_path: Path) -> None:
    learned = with_options(METHODS["affinequant"](), epochs=1)
    scaled = with_options(METHODS["smoothquant"](), alpha=0.9)
    steps = (("affinequant", learned), ("smoothquant", scaled), ("rtn", RTN()))
    out = quantize_tiny(model, tmp_path / "out", "w8a8-static", Recipe("both", steps), input_range="min-max").out
    manifest = read_json(out / "lowbit.json")
    # A stale range would clip, or be too wide for, inputs that the second step scales.
    assert all(own["clipped"] == 0 for own in manifest["blocks"][0]["steps"]["input_ranges"].values())
    assert "input_ranges" in manifest["blocks"][1]["steps"]


# The folder.


@pytest.mark.parametrize("scheme", STATIC)
def test_what_is_loaded_is_what_was_evaluated_and_what_stock_transformers_computes(
    scheme: str, model: Path, tmp_path: Path
) -> None:
    result = quantize_tiny(model, tmp_path / "out", scheme)
    stock = result.manifest.transformers
    assert stock.loads
    with torch.no_grad():
        streamed, loaded = streamed_logits(result.out, IDS), lowbit.load(result.out)(IDS).logits
        assert float((streamed - loaded).abs().max() / loaded.abs().max()) < 1e-5
        dtype = getattr(torch, stock.dtype)
        ours = lowbit.load(result.out, dtype=dtype)(IDS).logits
        theirs = AutoModelForCausalLM.from_pretrained(result.out, dtype=dtype)(IDS).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, AutoModelForCausalLM.from_pretrained(model, dtype=dtype)(IDS).logits)


def test_the_error_of_the_walk_is_that_of_the_folder(run: Path, model: Path) -> None:
    manifest = read_json(run / "lowbit.json")
    assert manifest["identity"]["input_range"] == manifest["request"]["input_range"] == "mse"
    assert all(row["relative_error"] < 0.01 for row in manifest["blocks"])
    stored = load_file(run / "block-00000.safetensors")
    scales = [stored[f"model.layers.0.self_attn.{name}_proj.input_scale"] for name in "qkv"]
    assert scales[0].dtype == torch.float32
    assert all(torch.equal(scale, scales[0]) for scale in scales)


def test_the_estimator_is_part_of_the_run_and_of_the_command_that_repeats_it(model: Path, tmp_path: Path) -> None:
    made = {
        name: quantize_tiny(model, tmp_path / name, "w8a8-static", input_range=name) for name in ("min-max", "99")
    }
    scales = {
        name: load_file(result.out / "block-00001.safetensors")["model.layers.1.mlp.down_proj.input_scale"]
        for name, result in made.items()
    }
    assert float(scales["99"]) < float(scales["min-max"])
    assert "--input-range 99" in command(made["99"].manifest.request)[0]
    with pytest.raises(LowbitError, match="its input_range is 99, this one's min-max"):
        quantize_tiny(model, tmp_path / "99", "w8a8-static", input_range="min-max")


def test_other_runs_have_no_estimator(model: Path, tmp_path: Path) -> None:
    for scheme in ("w8a8", "w4a16g16"):
        with pytest.raises(LowbitError, match=f"scheme {scheme} has no static inputs; give one that has, such as"):
            quantize_tiny(model, tmp_path / "out", scheme, input_range="mse")
    assert not (tmp_path / "out").exists()
    with pytest.raises(LowbitError, match="--input-range most given; allowed: min-max, mse, or a percentile"):
        quantize_tiny(model, tmp_path / "out", "nvfp4", input_range="most")


class Killed(BaseException):
    """Passes every handler of errors, as a kill does."""


def test_a_run_that_is_killed_between_its_shards_ends_with_the_same_bytes(
    model: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = block_writing.write_tensors

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if path.name == "block-00001.safetensors":
            raise Killed
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(block_writing, "write_tensors", write)
        with pytest.raises(Killed):
            quantize_tiny(model, tmp_path / "out", "w8a8-static", "gptq")
    quantize_tiny(model, tmp_path / "out", "w8a8-static", "gptq")
    assert folder_bytes(tmp_path / "out") == folder_bytes(run)


def test_end_to_end_tuning_keeps_the_ranges_of_the_steps_before(model: Path, run: Path, tmp_path: Path) -> None:
    tune = {"steps": ["gptq", {"tune": {"epochs": 1, "rank": 2}}], "window": 1}
    out = quantize_tiny(model, tmp_path / "out", "w8a8-static", recipe_from_dict(tune, "tuned")).out
    name = "model.layers.1.mlp.down_proj.input_scale"
    scale, untuned = (load_file(folder / "block-00001.safetensors")[name] for folder in (out, run))
    assert bool(scale.isfinite() & (scale > 0))
    with torch.no_grad():
        streamed, loaded = streamed_logits(out, IDS), lowbit.load(out)(IDS).logits
    assert float((streamed - loaded).abs().max() / loaded.abs().max()) < 1e-5
    assert 0.5 < float(scale / untuned) < 2


@pytest.mark.parametrize(("name", "value"), [("input_scale", float("nan")), ("input_scale", -1.0)])
def test_a_broken_range_is_refused(name: str, value: float, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    tensors = load_file(folder / "block-00001.safetensors")
    tensors[f"model.layers.1.mlp.down_proj.{name}"][:] = value
    write_tensors(folder / "block-00001.safetensors", tensors)
    with pytest.raises(LowbitError, match=r"model\.layers\.1\.mlp\.down_proj") as caught:
        lowbit.load(folder)
    assert "\n" not in str(caught.value)
    del tensors[f"model.layers.1.mlp.down_proj.{name}"]
    write_tensors(folder / "block-00001.safetensors", tensors)
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"].pop(f"model.layers.1.mlp.down_proj.{name}")
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(LowbitError, match=r"has no tensor 'model\.layers\.1\.mlp\.down_proj\.input_scale'"):
        lowbit.load(folder)


def test_the_input_of_a_quantized_head_stays_float(model: Path, tmp_path: Path) -> None:
    result = quantize_tiny(model, tmp_path / "out", "w8a8-static", overrides={"lm_head": "w8"})
    config = read_json(result.out / "config.json")["quantization_config"]
    groups = {tuple(group["targets"]): group["input_activations"] for group in config["config_groups"].values()}
    assert groups[(r"re:^lm_head$",)] is None
    assert groups[("Linear",)]["dynamic"] is False
    with torch.no_grad():
        ours = lowbit.load(result.out)(IDS).logits
        theirs = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.float32)(IDS).logits
    assert torch.equal(ours, theirs)


def test_a_layer_that_flattens_its_input_has_no_need_of_tokens(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "opt", num_hidden_layers=1)
    result = quantize_tiny(tmp_path / "model", tmp_path / "out", "w8a8-static")
    assert result.manifest.transformers.loads
    with torch.no_grad():
        ours = lowbit.load(result.out)(IDS).logits
        theirs = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.float32)(IDS).logits
    assert torch.equal(ours, theirs)


def test_a_loaded_static_run_is_copied_with_its_ranges_and_refuses_to_be_saved(run: Path) -> None:
    model = lowbit.load(run)
    copied = pickle.loads(pickle.dumps(deepcopy(model)))
    with torch.no_grad():
        assert torch.equal(copied(IDS).logits, model(IDS).logits)
        name = "model.layers.0.mlp.down_proj"
        model.get_submodule(name).lowbit_input_scale.mul_(2)
        assert not torch.equal(copied(IDS).logits, model(IDS).logits)
    assert not any("lowbit_input" in name for name in model.state_dict())
    with pytest.raises(LowbitError, match="inputs quantized as a8-asym-static"):
        model.save_pretrained(run / "saved")


def test_static_inputs_of_experts_are_refused():
    with pytest.raises(LowbitError, match="is an expert's and would have inputs in a8-sym-static"):
        make_plan(skeleton_of(tiny_model("mixtral")), parse_scheme("w8a8-sym-static"))
