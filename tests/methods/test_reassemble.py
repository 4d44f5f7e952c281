"""Channel reassembly: splitting is exact, dropping is the best answer, the search never ends above doing nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import lowbit
from lowbit.errors import LowbitError
from lowbit.methods import RTN
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.dropping import DropPlan, damped_inverse
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.options import with_options
from lowbit.methods.reassemble import Reassemble, candidate_counts, fold
from lowbit.methods.sites import apply
from lowbit.methods.statistics import input_statistics
from lowbit.models.block import Calib
from lowbit.models.forward import relative_error, run, run_all, run_quantized
from lowbit.models.runtime_ops import Gather, Matrix
from lowbit.pipeline.recipe import Recipe, load_recipe, with_settings
from lowbit.runs.streamed_model import StreamedModel
from tiny import NAMES, block_of, planned, save_tiny, tiny_ids, tiny_model

LINEARS = [f"0.self_attn.{n}_proj" for n in "qkvo"] + [f"0.mlp.{n}_proj" for n in ("gate", "up", "down")]
FLOAT_INPUTS = "w8a16"  # with these, splitting cannot help


def quantized(folder, out, steps):
    """The run of a recipe of ``steps`` at w4a4, of the model in ``folder``."""
    text = str(folder / "calib.txt")
    return lowbit.quantize(
        str(folder), out, scheme="w4a4", recipe=Recipe("r", steps), data=text, samples=4, length=24
    )


@cache
def case(name, dtype=torch.float32, outlier=0.0, scheme="w4a4"):
    """A layer whose up rows 5 and 9 are ``outlier`` times larger: outlier channels before down."""
    block, x = block_of(tiny_model(name), 1, dtype=dtype)
    block = planned(block, scheme)
    if outlier:
        up = channels(block).src
        weight = block.params[up.parameter].clone()
        weight[up.index][[5, 9]] *= outlier
        block = replace(block, params={**block.params, up.parameter: weight})
    return block, Calib(x, x, run_all(block, x))


def channels(block):
    return next(edge for edge in block.edges() if edge.kind == "channels")


def down_of(block):
    return channels(block).readers[0].module


def with_dead_channels(block):
    """Channels 0 and 1 reach nothing, so dropping them is exact."""
    down = f"{down_of(block)}.weight"
    weight = block.params[down].clone()
    weight[:, :2] = 0
    return replace(block, params={**block.params, down: weight})


def split_over_dead_channels(block):
    """Channel 5 as three copies, two of them at the places of channels 0 and 1."""
    weight = block.weight(down_of(block)).double()
    idx = torch.arange(weight.shape[1])
    idx[:2] = 5
    divisor = torch.where(idx == 5, 3.0, 1.0).double()
    return fold(block, channels(block), idx, divisor, weight)


@pytest.mark.parametrize("name", NAMES)
def test_splitting_a_channel_folds_and_leaves_the_float_function(name):
    block, calib = case(name, torch.float64)
    block = with_dead_channels(block)
    wanted = run(block, calib.x_fp)
    moved = split_over_dead_channels(block)
    error = (run(moved, calib.x_fp) - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-4 if any(edge.offset for edge in block.edges()) else 1e-12)
    assert {k: v.shape for k, v in moved.params.items()} == {k: v.shape for k, v in block.params.items()}
    seen = {}
    for key, some in (("before", block), ("after", moved)):
        run(some, calib.x_fp, taps={down_of(block): lambda x, key=key: seen.update({key: x.flatten(0, -2)})})
    assert torch.allclose(seen["after"][:, [0, 1, 5]], seen["before"][:, [5, 5, 5]] / 3, rtol=1e-4, atol=1e-9)


def test_codes_of_split_up_rows_stay_and_only_their_scale_changes():
    block, _ = case("llama")
    up = channels(block).src.module
    moved = split_over_dead_channels(with_dead_channels(block))
    before, after = (RTN()(b, None).qweights[up] for b in (block, moved))
    for row in (0, 1, 5):
        assert torch.equal(after.codes[row], before.codes[5])
        assert torch.allclose(after.qparams.scale[row], before.qparams.scale[5] / 3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama-odd", "phi3", "opt"])
def test_splitting_composes_with_maps_in_float64(name):
    block, calib = case(name, torch.float64)
    block = with_dead_channels(block)
    wanted = run(block, calib.x_fp)
    step = with_options(AffineQuant(), precision="double")
    trainer = AffineFit(step.sites, step.maps, step.clipping, step.objective, step.schedule, block, calib)
    trainer.begin(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in (leaf for site in trainer.sites for leaf in site.leaves()):
            leaf += 0.03 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        moved = replace(block, params=apply(block, trainer.sites, trainer.start)[0])
    done = split_over_dead_channels(moved)
    assert (run(done, calib.x_fp) - wanted).abs().max() < 1e-10 * wanted.abs().max()


@pytest.mark.parametrize("name", ["llama-odd", "gemma3", "phi3", "opt"])
@pytest.mark.parametrize("dense", [False, True])
def test_splitting_after_a_norm_is_a_gather_that_leaves_the_float_function(dense, name):
    block, calib = case(name, torch.float64)
    edge = next(edge for edge in block.edges() if edge.kind == "norm")
    norm, readers = edge.src.module, [dst.module for dst in edge.readers]
    params = dict(block.params)
    for reader in readers:  # channels 0 and 1 reach nothing
        params[f"{reader}.weight"] = params[f"{reader}.weight"].clone()
        params[f"{reader}.weight"][:, :2] = 0
    block = replace(block, params=params)
    wanted = run(block, calib.x_fp)
    if dense:  # a matrix runs there already, one that keeps to channels 2 and up
        generator = torch.Generator().manual_seed(0)
        a = torch.eye(64, dtype=torch.float64)
        a[2:, 2:] += 0.02 * torch.randn(62, 62, generator=generator, dtype=torch.float64)
        moved = {f"{reader}.weight": params[f"{reader}.weight"] @ a.mT for reader in readers}
        block = replace(block, params={**params, **moved}, ops={norm: Matrix(torch.linalg.inv(a))})
    idx = torch.arange(64)
    idx[:2] = 5
    divisor = torch.where(idx == 5, 3.0, 1.0).double()
    done = fold(block, edge, idx, divisor, torch.cat([block.weight(reader) for reader in readers]))
    assert type(done.ops[norm]) is (Matrix if dense else Gather)
    assert done.ops[norm].width == 64
    assert dense or done.ops[norm].into is None
    error = (run(done, calib.x_fp) - wanted).abs().max() / wanted.abs().max()
    assert error < (
        1e-4 if any(edge.offset for edge in block.edges()) else 1e-7
    )  # the factor 1/3 is stored in float32
    assert {k: v.shape for k, v in done.params.items()} == {k: v.shape for k, v in block.params.items()}


def test_reassembly_everywhere_reaches_every_reader_of_the_folder(tmp_path):
    save_tiny(tmp_path / "m", "llama-odd")
    steps = (("reassemble", Reassemble(sites="all", most=0.3)), ("rtn", RTN()))
    made = quantized(tmp_path / "m", tmp_path / "out", steps)
    gathers = [name for name, kind in made.manifest.runtime_ops.items() if kind == "gather"]
    assert gathers == list(made.manifest.runtime_ops)
    assert all(name.endswith("norm") for name in gathers)
    assert "gathers after norms" in made.manifest.transformers.why_not
    ids = tiny_ids()
    simulated = torch.cat([logits for _, logits in StreamedModel(tmp_path / "out").logits(ids)])
    loaded = lowbit.load(tmp_path / "out")(ids, use_cache=False).logits.detach()
    assert float((loaded - simulated).abs().max() / simulated.abs().max()) < 1e-5
    plain = quantized(tmp_path / "m", tmp_path / "plain", steps[1:]).manifest
    weights = sum(StreamedModel(tmp_path / "m").block(0).weight(n).numel() * 3 for n in LINEARS)
    more = 32 * 2 * 64 * len(gathers) / weights
    assert made.bits_per_weight == pytest.approx(plain.bits_per_weight + more)


def test_dropping_gives_the_least_squares_answer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    x[:, 3] = 0.9 * x[:, 1] - 0.4 * x[:, 2] + 0.01 * x[:, 3]
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    copies = torch.ones(8, dtype=torch.long)
    copies[6] = 2
    idx, divisor, answer = DropPlan(weight, x.T @ x, 1e-12, copies > 1).without(1, copies)
    gone = int((torch.arange(8) != idx).nonzero())
    # By brute force: the best single channel to leave out, and the best weights without it.
    errors = {}
    for i in set(range(8)) - {6}:
        kept = [j for j in range(8) if j != i]
        solved = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution
        errors[i] = float((x[:, kept] @ solved - x @ weight.T).square().sum())
    assert gone == min(errors, key=errors.get)
    assert idx[gone] == 6
    assert divisor.tolist() == [2.0 if j in (6, gone) else 1.0 for j in range(8)]
    assert float((x @ answer.T - x @ weight.T).square().sum()) == pytest.approx(errors[gone], rel=1e-6)
    assert answer[:, gone].abs().max() == 0


def test_candidates_are_the_papers_grid_without_repeats():
    peak = torch.tensor([10.0, 4.0, *[1.0] * 18])
    found = candidate_counts(peak, 0.5, 100)
    totals = [int((t - 1).sum()) for t in found]
    assert totals == sorted(set(totals))
    assert min(totals) > 0
    assert max(totals) <= 10
    for copies in found:
        theta = float((peak / copies).max())  # some theta gives these copies: every one is ceil(peak / theta)
        assert (peak / copies <= theta + 1e-6).all()
    assert candidate_counts(torch.ones(8), 0.5, 100) == []


@pytest.mark.parametrize("name", ["llama-odd", "gemma3", "phi3", "opt"])
def test_outlier_channels_are_split_where_that_helps(name):
    block, calib = case(name, outlier=30.0)
    errors = {}
    done = Reassemble(most=0.2, shrinkage=0)(block, calib)  # the error is measured on the same few tokens
    for key, some in (("plain", block), ("done", done)):
        errors[key] = relative_error(run_quantized(RTN()(some, calib), calib.x_q), calib.y_fp)
    record = done.record[1]["reassemble"][down_of(block)]
    assert record["copies"] > 0
    assert record["theta"] > 0
    scores = record["scores"]
    assert scores[str(record["copies"])] == min(scores.values()) < scores["0"]
    assert errors["done"] < errors["plain"]


def test_nothing_is_done_where_nothing_helps():
    block, calib = case("llama", scheme=FLOAT_INPUTS)
    done = Reassemble()(block, calib)
    scores = done.record[1]["reassemble"][down_of(block)]["scores"]
    kept = done.record[1]["reassemble"][down_of(block)]["copies"]
    assert scores[str(kept)] == min(scores.values())
    if kept == 0:
        assert all(torch.equal(done.params[key], block.params[key]) for key in block.params)


@pytest.mark.parametrize("ratio", [0.05, 0.2])
def test_a_fixed_ratio_is_taken_in_every_layer_even_where_it_does_not_help(ratio):
    block, calib = case("llama", scheme=FLOAT_INPUTS)
    step = Reassemble(theta="most", most=ratio)
    figures = step(block, calib).record[1]["reassemble"][down_of(block)]
    (down,) = block.linear_groups()[-1]
    peak = input_statistics(block, calib.x_fp, [down], ("peak",))[down]["peak"]
    most = int((candidate_counts(peak, ratio, step.grid)[-1] - 1).sum())
    assert 0 < figures["copies"] == most <= ratio * 96
    assert set(figures["scores"]) == {"0", str(most)}


@pytest.mark.parametrize("theta", ["most", "search"])
def test_an_input_that_is_always_zero_has_nothing_to_take_apart(theta):
    assert candidate_counts(torch.zeros(8), 0.5, 10) == []
    block, calib = case("llama")
    up = channels(block).src.parameter
    block = replace(block, params={**block.params, up: torch.zeros_like(block.params[up])})
    done = Reassemble(theta=theta)(block, replace(calib, y_fp=run_all(block, calib.x_fp)))
    assert done.record[1]["reassemble"][down_of(block)]["copies"] == 0


def test_ranges_of_earlier_steps_are_not_those_of_reassembled_channels():
    block, calib = case("llama", scheme="w8a8-static")
    with_ranges = with_input_ranges(block, calib)
    assert with_ranges.input_qparams
    fresh, handed = (Reassemble(theta="most", most=0.2)(start, calib) for start in (block, with_ranges))
    assert not handed.input_qparams
    assert all(torch.equal(handed.weight(name), fresh.weight(name)) for name in block.linears())


def test_a_fixed_theta_splits_what_exceeds_it_and_says_where_it_could_not():
    block, calib = case("llama", outlier=30.0)
    (down,) = block.linear_groups()[-1]
    peak = input_statistics(block, calib.x_fp, [down], ("peak",))[down]["peak"]
    second = float(peak.topk(3).values[1:].mean())  # between the second largest channel and the third
    done = Reassemble(theta=second, most=0.5)(block, calib)
    figures = done.record[1]["reassemble"][down]
    assert figures["copies"] == int(((peak / second).ceil() - 1).clamp(min=0).sum()) > 1
    assert figures["theta"] <= second
    assert not done.notes
    low = Reassemble(theta=second / 100, most=0.1)(block, calib)
    assert low.record[1]["reassemble"][down]["copies"] <= 0.1 * 96
    assert [
        note for note in low.notes if f"{down}: theta" in note.text and "more than 10.0% of the channels" in note.text
    ]
    high = Reassemble(theta=float(peak.max()) * 2)(block, calib)
    assert high.record[1]["reassemble"][down]["copies"] == 0
    assert torch.equal(high.weight(down), block.weight(down))


def test_the_inverse_for_dropping_is_the_inverse_and_a_bad_matrix_is_an_error():
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(damped_inverse(gram.clone(), 0.01) @ damped, torch.eye(12, dtype=torch.float64))
    for bad in (torch.full((4, 4), torch.nan), torch.tensor([[1.0, 2.0], [2.0, 1.0]])):
        with pytest.raises(LowbitError, match=r"or raise reassemble\.damping"):
            damped_inverse(bad.double(), 0.01)


def test_layers_that_stay_float_cost_no_pass(monkeypatch):
    block, calib = case("llama")
    block = replace(block, formats={})
    monkeypatch.setattr("lowbit.methods.layer_by_layer.run_all", None)
    assert Reassemble(sites="all")(block, calib) is block


def test_clips_follow_their_rows():
    block, calib = case("llama", outlier=30.0)
    clipped = with_options(AffineQuant(), epochs=1)(block, calib)
    edge = channels(block)
    idx = torch.arange(96)
    idx[:2] = 5
    done = fold(clipped, edge, idx, torch.ones(96).double(), clipped.weight(down_of(block)).double())
    for name in (edge.src.module, edge.partner.module):
        assert torch.equal(done.clips[name][0][:2], clipped.clips[name][0][[5, 5]])
    seen = input_statistics(done, calib.x_fp, [down_of(block)], ("peak",))
    assert seen[down_of(block)]["peak"].shape == (96,)


@pytest.mark.parametrize(
    "bad", [{"sites": "up"}, {"most": 0.0}, {"most": 0.6}, {"tries": 0}, {"damping": 0.0}, {"theta": 0.0}]
)
def test_options_that_make_no_sense_are_refused(bad):
    with pytest.raises(LowbitError, match=next(iter(bad))):
        Reassemble(**bad)


def test_theta_is_a_word_or_a_number_in_recipes_too():
    recipe = load_recipe("qllm-fold")
    for given, wanted in (("most", "most"), ("4", 4.0), ("2.5", 2.5)):
        assert with_settings(recipe, [f"reassemble.theta={given}"]).steps[0][1].theta == wanted
    with pytest.raises(LowbitError, match="did you mean 'most'"):
        with_settings(recipe, ["reassemble.theta=moost"])
