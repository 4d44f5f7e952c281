"""End-to-end correction: its start is what would have shipped, its gradient is the whole model's, its end ships."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowbit
from held import Held
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError
from lowbit.methods import METHODS, RTN
from lowbit.methods.fit_state import Fitted
from lowbit.methods.gptq import GPTQ
from lowbit.methods.options import with_options
from lowbit.methods.tune import Tune
from lowbit.models.block import Calib
from lowbit.models.forward import relative_error, run_all, run_quantized
from lowbit.models.runtime_ops import Clip
from lowbit.pipeline import end_to_end as module
from lowbit.pipeline import runner
from lowbit.pipeline.block_writing import shared_exponent_of
from lowbit.pipeline.end_to_end import Tuning
from lowbit.pipeline.recipe import load_recipe, recipe_from_dict
from lowbit.quant.format import QParams
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme import ModelFormats
from lowbit.runs.latent_weights import Latents, latent, latent_file, places, write_latents
from lowbit.runs.streamed_model import StreamedModel
from tiny import block_of, params_of, planned, save_tiny, skeleton_of, tiny_ids, tiny_model

pytestmark = pytest.mark.heavy  # makes whole runs by the dozen

FAMILIES = ["llama-odd", "qwen3", "gemma2", "phi3", "opt"]


def recipe_file(folder, *steps):
    path = folder / "recipe.yaml"
    path.write_text("steps: [" + ", ".join(steps) + "]\n")
    return str(path)


def quantized(folder: Path, out: Path, scheme: str, recipe: str, **more):
    return lowbit.quantize(
        str(folder), out, scheme=scheme, recipe=recipe, data=str(folder / "calib.txt"), samples=6, length=24, **more
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_places_round_to_the_codes_that_ship_with_the_qparams_that_ship(group, symmetric, bits):
    format = IntFormat(bits, group, symmetric)
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(bits))
    weight[0], weight[1], weight[2] = 0.0, weight[1].abs(), -weight[2].abs()
    clip = torch.linspace(0.3, 1.0, 12)[:, None]
    q = format.quantize(weight, format.qparams(weight, clip, clip))
    # Codes that are not the nearest, as GPTQ chooses them.
    other = (q.codes.int() + torch.randint(-1, 2, q.codes.shape)).clamp(0, format.levels).to(torch.uint8)
    for given in (q, replace(q, codes=other)):
        again = format.from_range(*format.range_of(given.qparams))
        assert torch.equal(again.scale, given.qparams.scale)
        assert torch.equal(again.zero, given.qparams.zero)
        shipped = format.quantize(latent(places(weight, given), given.qparams, format), again)
        assert torch.equal(shipped.codes, given.codes)
    # Where a weight is inside its cell and the range, its place is its own to 1/256 of a step.
    step = format.per_column(q.qparams, 64).scale
    inside = ((weight - q.dequantize()).abs() < 0.49 * step) & (weight != 0)
    error = ((latent(places(weight, q), q.qparams, format) - weight) / step)[inside]
    assert len(error) > 100
    assert float(error.abs().max()) < 1 / 256 + 1e-3


def first_folder(name, scheme, folder, steps=("rtn",), count=3, scaled=(), **sizes):
    """What ``Walk`` leaves for the step, of a tiny model's blocks, each with ``steps`` on float inputs."""
    model = tiny_model(name, num_hidden_layers=count, **sizes)
    with torch.no_grad():
        for key, times in scaled:
            for weight in (weight for full, weight in model.named_parameters() if key in full):
                weight.mul_(times)
    skeleton, ids = skeleton_of(model), tiny_ids(4)
    (folder / ".run").mkdir(parents=True)
    x = start = skeleton.embed(ids)
    blocks, formats = [], {}
    for index in range(count):
        block = planned(skeleton.block(index, params_of(model, skeleton, index)), scheme)
        formats |= {block.full_name(linear): found for linear, found in block.formats.items()}
        y = run_all(block, x)
        for step in steps:
            method = METHODS[step]() if isinstance(step, str) else step
            block = method(block, Calib(x, x, y))
        write_latents(folder, block)
        blocks.append(block)
        x = y
    plan = SimpleNamespace(formats=ModelFormats(formats, block.kv))
    walk = SimpleNamespace(
        out=folder, plan=plan, device="cpu", dtype=torch.float32, batch=4, skeletons=lambda ids: (skeleton, skeleton)
    )
    return walk, ids, x, blocks, start


def divergence(skeleton, ids, exact, got):
    p, q = (skeleton.logits(ids, hidden).log_softmax(-1) for hidden in (exact, got))
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scheme", ["w4a4", "w3a16g16-sym", "w4a8kv4"])
def test_value_and_gradient_are_those_of_the_whole_model_in_one_graph(scheme, name, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * 96 * 7)  # few positions at a time: several parts a step
    walk, ids, y_fp, blocks, start = first_folder(name, scheme, tmp_path)
    tuning = Tuning(Tune(rank=4), walk, ids, y_fp)
    chosen = torch.tensor([2, 0])
    with torch.no_grad():
        shipped = start[chosen]
        for block in blocks:
            shipped = run_quantized(block, shipped)
        wanted = float(divergence(tuning.student, ids[chosen], y_fp[chosen], shipped))
        assert float(tuning.loss(chosen)) == pytest.approx(wanted, rel=1e-4)  # the start is what would have shipped
        generator = torch.Generator().manual_seed(7)
        for group, _ in tuning.groups():
            for leaf in group:
                leaf.add_(0.02 * torch.randn(leaf.shape, generator=generator))
    leaves = [leaf for group, _ in tuning.groups() for leaf in group]
    value = tuning.loss(chosen)
    assert value.requires_grad
    got = torch.autograd.grad(value, leaves, allow_unused=True)
    x = tuning.rows(chosen)[0]
    for index in tuning.layers:
        x = tuning._through(index, x)
    naive = divergence(tuning.student, ids[chosen], y_fp[chosen], x)
    assert value.item() == pytest.approx(naive.item(), rel=1e-4)
    for mine, theirs in zip(got, torch.autograd.grad(naive, leaves, allow_unused=True), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert float((mine - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-9


@pytest.mark.parametrize("scheme", ["w8a8", "w3a16g16-sym"])
def test_rates_fall_with_the_root_of_what_is_lost_at_the_start(scheme, tmp_path):
    walk, ids, y_fp, blocks, start = first_folder("llama", scheme, tmp_path)
    train, held = Tune().schedule.split(len(ids))
    assert len(train) == 3
    assert len(held) == 1
    shipped = start[train]
    with torch.no_grad():
        for block in blocks:
            shipped = run_quantized(block, shipped)
        lost = float(divergence(walk.skeletons(ids)[0], ids[train], y_fp[train], shipped))
    tuning = Tuning(Tune(), walk, ids, y_fp)
    assert 0 < lost < 1
    assert tuning.rate == pytest.approx(lost**0.5, rel=1e-3)
    assert [rate for _, rate in tuning.groups()] == [tuning.rate * 5e-3, tuning.rate * 2e-3, tuning.rate * 2e-3]
    given = Tuning(Tune(scale=False), walk, ids, y_fp)
    assert [rate for _, rate in given.groups()] == [5e-3, 2e-3, 2e-3]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("gptq", "gptq, {{tune: {{epochs: {}}}}}"),
        ("refit", "refit, rtn, {{tune: {{epochs: {}}}}}"),
        ("refit", "refit, {{lowrank: {{epochs: {}}}}}, rtn"),
    ],
)
def test_what_is_fitted_in_closed_form_does_not_see_what_validates_the_learned(name, steps, tmp_path, monkeypatch):
    save_tiny(tmp_path / "m", "llama-odd", num_hidden_layers=2)
    shown, fitted = [], METHODS[name].__call__

    def watching(step, block, calib):
        shown.append(calib)
        return fitted(step, block, calib)

    monkeypatch.setattr(METHODS[name], "__call__", watching)
    seen = {}
    for epochs in (0, 1):
        recipe = recipe_file(tmp_path, steps.format(epochs))
        quantized(tmp_path / "m", tmp_path / f"out{epochs}", "w4a4", recipe)
        seen[epochs] = shown[0]  # of the first block, whose input is the same in both
        shown.clear()
    train, held = Tune().schedule.split(len(seen[0].x_q))  # without tune nothing judges: all are used
    assert len(seen[0].x_q) == 6
    assert len(held) == 1
    for stream in ("x_fp", "x_q", "y_fp"):
        assert torch.equal(getattr(seen[1], stream), getattr(seen[0], stream)[train])


def test_a_step_behind_the_learned_one_sees_all_sequences_though_an_equal_one_stands_before_it(tmp_path, monkeypatch):
    save_tiny(tmp_path / "m", "llama", num_hidden_layers=1)
    shown, fitted = [], METHODS["refit"].__call__

    def watching(step, block, calib):
        shown.append(len(calib.x_q))
        return fitted(step, block, calib)

    monkeypatch.setattr(METHODS["refit"], "__call__", watching)
    recipe = recipe_file(tmp_path, "refit", "lowrank: {epochs: 1}", "refit", "rtn")
    quantized(tmp_path / "m", tmp_path / "out", "w4a4", recipe)
    assert shown == [5, 6]


def test_a_start_that_is_far_off_or_no_number_keeps_the_rates_and_one_at_zero_learns_nothing():
    assert [Tune().rate(start) for start in (1.0, 7.0, float("inf"), float("nan"))] == [1.0] * 4
    assert Tune().rate(-1e-9) == 0.0


def test_the_gradient_of_the_gains_is_the_finite_difference(tmp_path):
    """Nothing rounds on the way from a gain to the loss where activations stay float."""
    walk, ids, y_fp, _, _ = first_folder("llama", "w3a16g16-sym", tmp_path)
    tuning = Tuning(Tune(), walk, ids, y_fp)
    chosen = torch.arange(4)
    tuning.loss(chosen).backward()
    assert len(tuning.gains) == 6
    for gain in tuning.gains.values():
        direction = torch.randn(gain.shape, generator=torch.Generator().manual_seed(3))
        values = []
        for step in (5e-3, -5e-3):
            with torch.no_grad():
                kept = gain.clone()
                gain.add_(step * direction)
                values.append(float(tuning.loss(chosen)))
                gain.copy_(kept)
        slope = float((gain.grad * direction).sum())
        assert slope == pytest.approx((values[0] - values[1]) / 1e-2, rel=0.02, abs=1e-3)


def test_a_step_holds_one_block_whatever_the_depth(tmp_path):
    held, learned = {}, {}
    for count in (2, 4):
        walk, ids, y_fp, _, start = first_folder("llama", "w4a4", tmp_path / str(count), count=count)
        tuning = Tuning(Tune(rank=2), walk, ids, y_fp)
        with Held() as counted:
            tuning.loss(torch.tensor([1])).backward()
        held[count] = counted.numbers
        learned[count] = sum(leaf.numel() for group, _ in tuning.groups() for leaf in group)
    block = sum(parameter.numel() for parameter in tuning.student.layers[0].parameters())
    # Two more blocks: gradients of what they learn, and the input that each of them keeps.
    more = learned[4] - learned[2] + 2 * start[1].numel()
    assert more < block / 2
    assert held[4] - held[2] < 1.5 * more
    assert held[2] > block


@pytest.mark.parametrize("steps", [("gptq",), ("smoothquant", "gptq"), ("affinequant", "rtn")], ids="-".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_without_steps_what_other_methods_rounded_comes_out_as_it_was(name, steps, tmp_path):
    made = [with_options(METHODS[s](), epochs=1) if METHODS[s]().schedule else s for s in steps]
    walk, ids, y_fp, blocks, _ = first_folder(name, "w3a16g16-asym", tmp_path, made)
    tuning = Tuning(Tune(), walk, ids, y_fp)
    for index, block in enumerate(blocks):
        lowbit.checkpoints.writing.write_json(tmp_path / f".run/block-{index:05d}.json", {"notes": [], "record": {}})
        done = tuning.quantize_layer(index, Fitted(best=1))
        assert set(done.qweights) == set(block.qweights)
        for linear, q in block.qweights.items():
            assert torch.equal(done.qweights[linear].codes, q.codes), linear
            assert torch.equal(done.qweights[linear].qparams.scale, q.qparams.scale)
        quantized = {f"{linear}.weight" for linear in block.qweights}
        assert all(torch.equal(done.params[key], block.params[key]) for key in set(block.params) - quantized)
        assert set(done.params) == set(block.params)


KINDS = ["nvfp4a16", "mxfp4", "mxfp6a16", "fp8", "fp8-block", "q2_k", "q3_k", "q4_k", "iq4_nl"]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}


@pytest.mark.parametrize("step", [RTN(search=True), GPTQ(search=True)], ids=["rtn", "gptq"])
@pytest.mark.parametrize("scheme", KINDS)
def test_without_steps_what_was_searched_in_another_format_comes_out_as_it_was(scheme, step, tmp_path):
    walk, ids, y_fp, (block,), _ = first_folder("llama", scheme, tmp_path, [step], 1, **WIDE)
    write_json(tmp_path / ".run/block-00000.json", {"notes": [], "record": {}})
    done = Tuning(Tune(), walk, ids, y_fp).quantize_layer(0, Fitted(best=1))
    for linear, q in block.qweights.items():
        assert torch.equal(done.qweights[linear].qparams.scale, q.qparams.scale), linear
        assert torch.equal(done.qweights[linear].qparams.zero, q.qparams.zero), linear
        # A table's cells have no middle: the latent weight's place is rounded within them.
        same = done.qweights[linear].codes == q.codes
        assert bool(same.all()) or (scheme == "iq4_nl" and float(same.float().mean()) > 0.99), linear


@pytest.mark.parametrize("scheme", KINDS)
def test_moved_ends_give_scales_that_the_format_stores(scheme, tmp_path):
    # So small that E4M3 scales are subnormal numbers over the power of two that q, k and v share.
    small = (("k_proj", 2.0**-18), ("up_proj", 2.0**-17))
    walk, ids, y_fp, (block,), _ = first_folder("llama", scheme, tmp_path, [RTN(search=True)], 1, small, **WIDE)
    write_json(tmp_path / ".run/block-00000.json", {"notes": [], "record": {}})
    tuning = Tuning(Tune(), walk, ids, y_fp)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in (leaf for leaves in tuning.ends.values() for leaf in leaves):
            leaf.add_(0.3 * torch.randn(leaf.shape, generator=generator) - 3 * (torch.rand(len(leaf), 1) < 0.1))
    done = tuning.quantize_layer(0, Fitted(best=1))
    moved = [
        not torch.equal(q.qparams.scale, block.qweights[name].qparams.scale) for name, q in done.qweights.items()
    ]
    assert all(moved) if block.weight_format("0.mlp.up_proj").learns_range else not tuning.ends
    for linear, q in done.qweights.items():
        layout = done.formats[linear].layout
        stored = layout.unpack(layout.pack(q, shared_exponent_of(done, linear)), q.format)
        assert torch.equal(stored.dequantize(), q.dequantize())


def calibration_ids(model: Path) -> torch.Tensor:
    """The tokens that ``quantized`` calibrates on."""
    return lowbit.data.text.calibration(
        str(model / "calib.txt"), lowbit.checkpoints.resolve.load_tokenizer(model), 6, 24, 0
    ).ids


def shipped_divergence(model: Path, run: Path, ids: torch.Tensor) -> float:
    """``KL(float || run)`` of two folders, in nats a token, on the sequences that the fit holds out."""
    held = ids[Tune().schedule.split(len(ids))[1]]
    exact, ours = (
        torch.cat([logits for _, logits in StreamedModel(folder).logits(held)]).log_softmax(-1)
        for folder in (model, run)
    )
    return float((exact.exp() * (exact - ours)).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama-odd", "w4a8"), ("llama-odd", "w3a16g16-asym"), ("gemma2", "w3a16g16-asym"), ("opt", "w4a8")],
)
def test_what_is_trained_is_what_ships(name, scheme, tmp_path):
    save_tiny(tmp_path / "m", name)
    made = quantized(
        tmp_path / "m",
        tmp_path / "out",
        scheme,
        recipe_file(tmp_path, "rtn", "tune: {epochs: 8, lr: 1.0e-3, scale: false}"),
    )
    record = made.manifest.blocks[0].steps["tune"]
    assert record["best_epoch"] > 0
    assert record["loss"][-1] < 0.8 * record["loss"][0]
    assert min(record["held_out"]) == record["held_out"][record["best_epoch"]] < record["held_out"][0]
    ids = calibration_ids(tmp_path / "m")
    kept = record["held_out"][record["best_epoch"]]
    assert shipped_divergence(tmp_path / "m", tmp_path / "out", ids) == pytest.approx(kept, rel=1e-3)
    # The rest of the manifest is of what ships, too.
    x_fp, x_q = (StreamedModel(folder) for folder in (tmp_path / "m", tmp_path / "out"))
    a, b = x_fp.skeleton.embed(ids), x_q.skeleton.embed(ids)
    for index in range(3):
        a = run_all(x_fp.block(index), a)
        b = run_quantized(x_q.block(index), b)
        assert relative_error(b, a) == pytest.approx(made.manifest.blocks[index].relative_error, rel=1e-12)
    assert not (tmp_path / "out" / ".run").exists()


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16", "iq4_nl"])
def test_what_is_trained_in_another_format_is_what_ships(scheme, tmp_path):
    save_tiny(tmp_path / "m", "llama", num_hidden_layers=2)
    recipe = recipe_file(tmp_path, "rtn", "tune: {epochs: 8, lr: 3.0e-3}")
    record = quantized(tmp_path / "m", tmp_path / "out", scheme, recipe).manifest.blocks[0].steps["tune"]
    assert record["best_epoch"] > 0
    assert record["loss"][-1] < record["loss"][0]
    kept = record["held_out"][record["best_epoch"]]
    ids = calibration_ids(tmp_path / "m")
    assert shipped_divergence(tmp_path / "m", tmp_path / "out", ids) == pytest.approx(kept, rel=1e-3)


def test_rounded_embeddings_and_heads_are_trained_with(tmp_path):
    save_tiny(tmp_path / "m", "llama", num_hidden_layers=2)
    overrides = {"lm_head": "w4", "*embed_tokens": "w4"}
    recipe = recipe_file(tmp_path, "rtn", "tune: {epochs: 2}")
    made = quantized(tmp_path / "m", tmp_path / "out", "w4a8", recipe, overrides=overrides)
    record = made.manifest.blocks[0].steps["tune"]
    kept = record["held_out"][record["best_epoch"]]
    ids = calibration_ids(tmp_path / "m")
    assert shipped_divergence(tmp_path / "m", tmp_path / "out", ids) == pytest.approx(kept, rel=1e-3)


@pytest.mark.parametrize("overrides", [{"lm_head": "w2"}, {"lm_head": "w2", "*embed_tokens": "w8"}])
def test_a_head_of_its_own_is_trained_with_where_the_source_ties_it_to_the_embedding(overrides, tmp_path):
    save_tiny(tmp_path / "m", "llama-odd", num_hidden_layers=2, tie_word_embeddings=True)
    recipe = recipe_file(tmp_path, "rtn", "tune: {epochs: 1, lr: 0, lr_ends: 0, lr_norms: 0}")
    made = quantized(tmp_path / "m", tmp_path / "out", "w8a16", recipe, overrides=overrides)
    ids = calibration_ids(tmp_path / "m")
    start = made.manifest.blocks[0].steps["tune"]["held_out"][0]
    assert shipped_divergence(tmp_path / "m", tmp_path / "out", ids) == pytest.approx(start, rel=1e-3)


def test_the_head_that_the_step_trains_with_ships_and_knows_nothing_of_the_validation_split(tmp_path, monkeypatch):
    save_tiny(tmp_path / "m", "llama", num_hidden_layers=1)
    seen = []
    measure = runner.head_gram
    monkeypatch.setattr(runner, "head_gram", lambda *given: seen.append(given[1]) or measure(*given))
    recipe = recipe_file(tmp_path, "gptq: {head: true}", "tune: {epochs: 2, lr: 0.05}")
    made = quantized(tmp_path / "m", tmp_path / "out", "w4a8", recipe, overrides={"lm_head": "w3"})
    ids = calibration_ids(tmp_path / "m")
    train, _ = Tune().schedule.split(len(ids))
    assert [one.tolist() for one in seen] == [ids[train].tolist()]
    record = made.manifest.blocks[0].steps["tune"]
    assert record["best_epoch"] > 0
    shipped = shipped_divergence(tmp_path / "m", tmp_path / "out", ids)
    assert shipped == pytest.approx(min(record["held_out"]), rel=1e-3)


def test_runtime_ops_are_trained_with_and_kept(tmp_path):
    save_tiny(tmp_path / "m", "llama", num_hidden_layers=2)
    reassemble = "reassemble: {sites: all, most: 0.2}"
    made = quantized(
        tmp_path / "m", tmp_path / "out", "w4a4", recipe_file(tmp_path, reassemble, "rtn", "tune: {epochs: 12}")
    )
    assert made.manifest.runtime_ops
    assert set(made.manifest.blocks[0].steps) == {"reassemble", "tune"}
    record = made.manifest.blocks[0].steps["tune"]
    assert record["held_out"][record["best_epoch"]] < record["held_out"][0]
    page = lowbit.report([tmp_path / "out"], out=tmp_path / "report.html").out.read_text()
    first, least = record["held_out"][0], min(record["held_out"])
    assert f"of the whole model: from {first:.3f} to {least:.3f} nats a token on the validation split" in page


def test_no_epochs_leave_the_step_out(tmp_path):
    save_tiny(tmp_path / "m", "qwen2")
    recipe = recipe_file(tmp_path, "gptq", "tune: {epochs: 0}")
    quantized(tmp_path / "m", tmp_path / "with", "w4a8", recipe)
    quantized(tmp_path / "m", tmp_path / "without", "w4a8", "gptq")
    for index in range(3):
        name = f"block-{index:05d}.safetensors"
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_the_step_stands_last_and_its_options_are_checked():
    for steps in (["tune", "rtn"], ["rtn", "tune", "tune"], ["tune"]):
        with pytest.raises(LowbitError, match=r"tune comes last|exactly one step quantizes"):
            recipe_from_dict({"steps": steps}, "x")
    with pytest.raises(LowbitError, match=r"tune.rank 0 given; it must be 1 or more"):
        Tune(rank=0)
    with pytest.raises(LowbitError, match="lr_end"):
        recipe_from_dict({"steps": ["rtn", {"tune": {"lr_end": 1.0}}]}, "x")
    recipe = recipe_from_dict({"steps": ["rtn", "tune"]}, "x")
    assert [name for name, _ in recipe.block_steps] == ["rtn"]
    assert recipe.tune == Tune()
    assert load_recipe("rtn").tune is None


def test_latents_are_taken_apart_as_they_were_put_together(tmp_path):
    block, x = block_of(tiny_model("opt"), 1, 1)
    done = METHODS["rtn"]()(planned(block, "w4a8"), Calib(x, x, x))
    clip = Clip(torch.tensor([0.9, 0.8]), torch.linspace(-0.5, 0.5, 96))
    done = replace(done, ops={"1.fc2": clip})
    write_latents(tmp_path, done)
    file = Checkpoint(tmp_path, [latent_file(1)])
    found = Latents(file.read(file.names))
    assert set(found.params) == {n for n in done.params if n.removesuffix(".weight") not in done.qweights}
    assert set(found.places) == set(done.qweights)
    assert all(isinstance(qparams, QParams) for qparams in found.qparams.values())
    assert type(found.ops["1.fc2"]) is Clip
    assert torch.equal(found.ops["1.fc2"].ratios, clip.ratios)
    assert torch.equal(found.ops["1.fc2"].offset, clip.offset)


def test_a_block_that_is_not_finite_is_never_written(tmp_path, monkeypatch):
    save_tiny(tmp_path / "m", "llama", num_hidden_layers=2)
    rounded = Tuning.quantize_layer

    def broken(self, index, fitted):
        block = rounded(self, index, fitted)
        norm = f"{index}.input_layernorm.weight"
        return replace(block, params={**block.params, norm: block.params[norm] * torch.nan}) if index == 1 else block

    monkeypatch.setattr(Tuning, "quantize_layer", broken)
    with pytest.raises(LowbitError, match=r"block 1: '1.input_layernorm.weight' became NaN or infinite"):
        quantized(tmp_path / "m", tmp_path / "out", "w4a8", recipe_file(tmp_path, "rtn", "tune: {epochs: 2}"))
    assert (tmp_path / "out/block-00000.safetensors").exists()
    assert not (tmp_path / "out/block-00001.safetensors").exists()
