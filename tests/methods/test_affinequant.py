"""AffineQuant: its maps leave the float function, what is trained is what ships, gradients are right."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.methods import METHODS, RTN
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.fit_state import Fitted
from lowbit.methods.maps import DOMINANCE
from lowbit.methods.options import with_options
from lowbit.methods.sites import SITES, apply
from lowbit.methods.training import fit
from lowbit.models.block import Calib
from lowbit.models.equivalence import can_shift
from lowbit.models.forward import relative_error, run, run_all, run_quantized
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme_names import parse_scheme
from tiny import NAMES, block_of, planned, tiny_model

W4A4, W3 = "w4a4", "w3a16g16-asym"
SOME = ["llama-odd", "phi3-partial", "qwen3", "gemma3", "opt"]
CHOICES = {
    "qkv": ("diagonal",),  # a matrix behind a norm leaves a runtime op
    "mlp": ("diagonal",),
    "heads": ("diagonal", "matrix"),
    "qk": ("diagonal", "matrix"),
    "channels": ("diagonal",),
}


def affine(**options):
    """The step with some options set, whatever group they are in."""
    return with_options(AffineQuant(), **options)


def fit_of(step, block, calib):
    """What the step fits with."""
    return AffineFit(step.sites, step.maps, step.clipping, step.objective, step.schedule, block, calib)


@cache
def case(name, scheme=W4A4, dtype=torch.float32):
    block, x = block_of(tiny_model(name), 1, dtype=dtype)
    block = planned(block, scheme)
    return block, Calib(x, x, run_all(block, x))


def trained(step, name, scheme=W4A4):
    block, calib = case(name, scheme)
    return block, calib, step(block, calib)


def output_error(block, calib):
    """Of the block as it ships, quantized to nearest."""
    return relative_error(run_quantized(RTN()(block, calib), calib.x_q), calib.y_fp)


def randomly_moved(step, name, noise=0.05):
    """A fit whose maps and shifts are random numbers, in float64; with Q, K and V quantized all train."""
    block, calib = case(name, "w4a4kv4", torch.float64)
    trainer = fit_of(with_options(step, precision="double"), block, calib)
    trainer.begin(step.schedule.epochs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in trainer.sites:
            for leaf in site.leaves():
                leaf += noise * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    return block, calib, trainer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("site", SITES)
def test_each_site_leaves_the_float_function_in_float64(site, name):
    others = dict.fromkeys(SITES, "off")
    for choice in CHOICES[site]:
        block, calib, trainer = randomly_moved(affine(**{**others, site: choice}, signs=False), name)
        assert [one.label for one in trainer.sites] == (
            ["qk", "qk-free"] if (site, name) == ("qk", "phi3-partial") else [site]
        )
        params, behind = apply(block, trainer.sites, trainer.start)
        assert not behind
        changed = [key for key, value in params.items() if not torch.equal(value, trainer.start[key])]
        assert changed, (site, choice)
        assert all(p.dtype == torch.float64 for p in params.values())
        # Norms that store 1 + w compute their gain in float32 inside the library.
        tolerance = 1e-4 if any(edge.offset for edge in block.edges()) else 1e-10
        error = (run(block, calib.x_fp, params) - calib.y_fp).abs().max() / calib.y_fp.abs().max()
        assert error < tolerance, (site, choice, float(error))


@pytest.mark.parametrize(
    ("kind", "name"), [("masked", name) for name in NAMES] + [(k, n) for k in ("lu", "blocks", "svd") for n in SOME]
)
def test_all_sites_together_leave_the_float_function_in_float64(kind, name):
    block, calib, trainer = randomly_moved(affine(parametrisation=kind, block_size=8), name)
    assert len(trainer.sites) == (6 if name == "phi3-partial" else 5)
    params, _ = apply(block, trainer.sites, trainer.start)
    tolerance = 1e-4 if any(edge.offset for edge in block.edges()) else 1e-10
    error = (run(block, calib.x_fp, params) - calib.y_fp).abs().max() / calib.y_fp.abs().max()
    assert error < tolerance


@pytest.mark.parametrize(("name", "shifts"), [("opt", 3), ("llama-odd", 1), ("qwen2", 0), ("llama", 0)])
def test_shifts_are_where_both_ends_have_a_bias(name, shifts):
    block, _calib, trainer = randomly_moved(AffineQuant(), name)
    assert sum(can_shift(block, edge) for edge in block.edges()) == shifts
    shifted = [site for site in trainer.sites if site.shift is not None]
    assert len(shifted) == shifts
    assert all(float(site.shift.detach().abs().min()) > 0 for site in shifted)
    assert not [site for site in randomly_moved(affine(shift=False), name)[2].sites if site.shift is not None]


def test_the_start_takes_absolute_maxima_and_centres_what_is_shifted():
    block, calib = case("opt")
    trainer = fit_of(affine(heads="off", init_peaks="absolute"), block, calib)
    started = replace(block, params=trainer.base)
    seen = []
    run(started, calib.x_fp, taps={"1.self_attn.q_proj": seen.append})
    x = seen[0].flatten(0, 1)
    high, low = x.amax(0), x.amin(0)
    assert torch.allclose(high, -low, atol=1e-4)  # the shift put every channel's range around 0
    weight = torch.stack([started.weight(f"1.self_attn.{n}_proj").abs().amax(0) for n in "qkv"]).amax(0)
    assert torch.allclose(high, weight, rtol=1e-3)  # power 0.5 gives both sides the same maxima


@pytest.mark.parametrize("scheme", [W4A4, W3], ids=["w4a4", "w3g16"])
@pytest.mark.parametrize(
    ("precision", "name"),
    [("float", name) for name in SOME] + [(p, n) for p in ("float-double", "double") for n in ("llama-odd", "opt")],
)
def test_what_is_trained_is_what_ships(precision, scheme, name):
    block, calib = case(name, scheme)
    step = affine(epochs=1, precision=precision, loss="mse")
    trainer = fit_of(step, block, calib)
    fitted = fit(trainer.groups(), trainer.loss, 4, step.schedule, 1, trainer.begin, trainer.project)
    with torch.no_grad():
        last, ops = trainer.quantized()
        error = float(trainer.loss(torch.arange(4)))
    done = RTN()(trainer.fold(fitted), calib)
    assert not ops
    assert not done.ops
    for linear, q in done.qweights.items():
        assert torch.equal(q.dequantize(), last[f"{linear}.weight"]), linear
    for key, value in done.params.items():
        assert torch.equal(value, last[key]) or key.removesuffix(".weight") in done.qweights
    # In the dtype that it was trained in: one activation that is nearly a tie may round the other way in another.
    y = run(done, calib.x_q.to(trainer.run_dtype), done.quantized_params(), quantized=True)
    assert relative_error(y, calib.y_fp) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("name", ["llama-odd", "opt"])
@pytest.mark.parametrize("kind", ["masked", "lu", "svd"])
def test_gradients_agree_with_finite_differences(kind, name, monkeypatch):
    """Rounding has no true gradient, so a smooth stand-in takes its place; everything around it is the real thing."""
    monkeypatch.setattr(
        IntFormat, "fake_quant_clipped", lambda self, weight, *clips: weight + 0.05 * torch.sin(5 * weight)
    )
    # The shipped parameters are float32; for differences of losses that is too coarse.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    block, calib = case(name, "w4a16", torch.float64)
    trainer = fit_of(affine(parametrisation=kind, precision="double", clip=False), block, calib)
    trainer.begin(20)
    chosen = torch.arange(2)
    generator = torch.Generator().manual_seed(0)
    leaves = [leaf for site in trainer.sites for leaf in site.leaves()]
    trainer.loss(chosen).backward()
    for leaf in leaves:
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        # Llama's norm computes in float32 whatever it is given: its differences need a longer step.
        values, step = [], 1e-5 if name == "opt" else 2e-3
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * direction
                values.append(float(trainer.loss(chosen)))
                leaf -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert float((leaf.grad * direction).sum()) == pytest.approx(
            slope, rel=1e-5 if name == "opt" else 2e-2, abs=1e-7
        )


def test_clipping_learns_along_the_papers_gradient():
    scheme = parse_scheme(W3)
    exact = replace(scheme, weight=replace(scheme.weight, scale_dtype=torch.float32))
    block, calib = case("llama", exact)
    trainer = fit_of(affine(**dict.fromkeys(SITES, "off")), block, calib)
    assert [len(tensors) for tensors, _ in trainer.groups()] == [0, 14]
    name = "1.mlp.down_proj"
    low, high = trainer.clips[name].leaves()
    weight = block.weight(name)
    trainer.quantized()[0][f"{name}.weight"].sum().backward()
    grouped = weight.unflatten(1, (-1, 16))
    clip = [torch.full(low.shape, 4.0, dtype=torch.float64).sigmoid() for _ in range(2)]
    top, bottom = (grouped.amax(-1).clamp(min=0).double(), grouped.amin(-1).clamp(max=0).double())
    scale = (clip[1] * top - clip[0] * bottom) / 7
    steps = grouped / scale[..., None]
    zero = (-clip[0] * bottom / scale).round()
    free = (steps.round() + zero[..., None] >= 0) & (steps.round() + zero[..., None] <= 7)
    # d value / d scale: round(w/s) - w/s inside the range, code - zero outside of it; the zero moves it as well.
    inside = torch.where(free, steps.round() - steps, (steps.round() + zero[..., None]).clamp(0, 7) - zero[..., None])
    d_zero = torch.where(free, 0.0, -1.0) * scale[..., None]
    slope = clip[1] * (1 - clip[1])
    by_scale = inside.sum(-1) * top / 7 * slope
    by_zero = d_zero.sum(-1) * (clip[0] * bottom / scale**2 * top / 7) * slope
    assert torch.allclose(high.grad.double(), by_scale + by_zero, atol=1e-3 * float(high.grad.abs().max()))


@pytest.mark.parametrize("name", ["llama-odd", "opt", "qwen3"])
def test_learning_beats_the_start_and_affine_beats_rounding(name):
    errors = {}
    for epochs in (0, 6):
        block, calib, done = trained(affine(epochs=epochs, held_out=0.0), name, W3)
        errors[epochs] = output_error(done, calib)
    assert errors[6] < 0.9 * min(errors[0], output_error(block, calib))


@pytest.mark.parametrize("epochs", [0, 1])
def test_few_epochs(epochs):
    _, calib, done = trained(affine(epochs=epochs), "llama-odd")
    record = done.record[1]["affinequant"]
    assert len(record["held_out"]) == epochs + 1
    assert len(record["loss"]) == epochs
    assert (run_all(done, calib.x_fp) - calib.y_fp).abs().max() < 1e-4 * calib.y_fp.abs().max()
    assert record["merge_error"] < 1e-9


def test_a_block_that_runs_in_sixteen_bits_keeps_maps_and_quantizers_in_thirty_two():
    block, calib = case("llama-odd", W3)
    half = Calib(*(t.bfloat16() for t in (calib.x_fp, calib.x_q, calib.y_fp)))

    def cast(value):  # what the model passes to a layer comes in the model's dtype
        if isinstance(value, tuple):
            return tuple(cast(part) for part in value)
        return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    block = replace(block, kwargs=tuple({k: cast(v) for k, v in kwargs.items()} for kwargs in block.kwargs))
    step = affine(epochs=2, held_out=0.0)
    trainer = fit_of(step, block, half)
    assert trainer.loss(torch.arange(2)).dtype == torch.float32
    assert all(leaf.dtype == torch.float32 for leaves, _ in trainer.groups() for leaf in leaves)
    done = step(block, half)
    assert all(value.dtype == torch.float32 for value in done.params.values())
    with torch.no_grad():
        start = float(trainer.loss(torch.arange(4)))
    assert done.record[1]["affinequant"]["loss"][-1] < start


def test_omniquant_is_the_same_with_diagonals():
    options = affine(heads="diagonal", qk="diagonal", channels="off", epochs=1)
    _, _, done = trained(options, "llama-odd", "w4a4kv4")
    kinds = {name: facts["map"] for name, facts in done.record[1]["affinequant"]["sites"].items()}
    assert kinds == dict.fromkeys(("1.qkv", "1.mlp", "1.heads", "1.qk"), "diagonal")
    full = affine(epochs=1)
    _, _, done = trained(full, "llama-odd")
    kinds = {name: facts["map"] for name, facts in done.record[1]["affinequant"]["sites"].items()}
    assert kinds["1.heads"] == "masked"
    assert kinds["1.qk"] == "rotation"
    assert kinds["1.channels"] == "diagonal"


def test_dominance_is_enforced_through_a_whole_fit():
    for dominance, holds in (("enforce", True), ("report", False)):
        options = affine(epochs=8, dominance=dominance, lr_maps=0.05, held_out=0.0)
        _, _, done = trained(options, "llama-odd")
        margin = done.record[1]["affinequant"]["sites"]["1.heads"]["margin"]
        assert (margin > 0) == holds, (dominance, margin)
    with pytest.raises(LowbitError, match="it applies to 'masked' and 'blocks' only"):
        affine(dominance="enforce", parametrisation="lu")


def test_dominance_and_condition_hold_after_every_step_of_a_fit_that_runs_into_both():
    block, calib = case("opt", "w3a16-asym")
    step = affine(
        qkv="matrix",
        mlp="matrix",
        dominance="enforce",
        epochs=20,
        lr_maps=0.3,
        held_out=0.0,
        loss="mse",
        decay="none",
    )
    trainer, margins, conditions = fit_of(step, block, calib), [], []

    def project():
        trainer.project()
        matrices = [site.map for site in trainer.sites if site.map.is_matrix]
        margins.append(min(float(map.margins().min()) for map in matrices))
        conditions.append(max(float(map.conditions().max()) for map in matrices))

    fit(trainer.groups(), trainer.loss, 4, step.schedule, begin=trainer.begin, project=project)
    assert trainer.shrunk  # the bound was hit
    assert min(margins) >= 1 - DOMINANCE - 1e-5  # float32 sums of 64 entries
    assert max(conditions) <= step.maps.condition


def test_condition_is_kept_through_a_fit_with_an_absurd_learning_rate():
    options = affine(epochs=3, lr_maps=0.5, condition=50.0, held_out=0.0)
    _, calib, done = trained(options, "llama-odd")
    assert all(facts["condition"] <= 50.0 * (1 + 1e-4) for facts in done.record[1]["affinequant"]["sites"].values())
    assert all(torch.isfinite(value).all() for value in done.params.values())
    assert (run_all(done, calib.x_fp) - calib.y_fp).abs().max() < 1e-2 * calib.y_fp.abs().max()


@pytest.mark.parametrize("name", ["opt", "llama-odd"])
def test_the_record_has_the_merge_error_as_stored_and_before_the_cast(name):
    errors = {}
    for precision in ("float", "float-double", "double"):
        options = affine(precision=precision, mask="none", qkv="matrix", mlp="matrix", dominance="off")
        block, calib = case(name, "w3a16-asym")
        trainer = fit_of(options, block, calib)
        trainer.begin(1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for leaf in (leaf for site in trainer.sites for leaf in site.leaves()):
                leaf += 0.1 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        record = trainer.fold(Fitted()).record[1]["affinequant"]
        errors[precision] = record["merge_error_before_cast"]
        # Stored in float32: a unit in the last place of the weights is 6e-8 of them, its square 4e-15.
        assert record["merge_error"] > 1e-15
    assert errors["float"] > 1e-14
    assert errors["float-double"] < 1e-24
    assert errors["double"] == errors["float-double"]


def test_rows_that_are_constant_or_have_one_sign_do_no_harm():
    block, calib = case("llama-odd")
    params = dict(block.params)
    for key in ("1.self_attn.v_proj.weight", "1.mlp.up_proj.weight", "1.mlp.down_proj.weight"):
        weight = params[key].clone()
        weight[0], weight[1], weight[2] = 0.0, weight[1].abs() + 0.1, 0.5
        params[key] = weight
    block = replace(block, params=params)
    calib = Calib(calib.x_fp, calib.x_q, run_all(block, calib.x_fp))
    for scheme in (W4A4, W3, "w2a16g16-sym"):
        done = RTN()(affine(epochs=2)(planned(block, scheme), calib), calib)
        assert all(torch.isfinite(value).all() for value in done.params.values())
        for q in done.qweights.values():
            assert torch.equal(q.qparams.zero, q.qparams.zero.round().clamp(0, q.format.levels))
            assert torch.isfinite(q.dequantize()).all()


def test_a_window_is_fitted_layer_by_layer_unless_it_is_to_be_fitted_as_one():
    both, x = block_of(tiny_model("llama-odd"), 1, 2)
    both = planned(both, W4A4)
    calib = Calib(x, x, run_all(both, x))
    step = affine(epochs=2)
    in_turn = step(both, calib)
    assert sorted(in_turn.record) == [1, 2]
    block = both.part(0, 1)
    first = step(block, Calib(x, x, run_all(block, x)))
    for name, value in first.params.items():
        assert torch.equal(in_turn.params[name], value)
    second = both.part(1, 2)
    x_fp, x_q = run_all(block, x), run_quantized(RTN()(first, calib), x)
    alone = step(second, Calib(x_fp, x_q, run_all(second, x_fp)))
    for name, value in alone.params.items():
        assert torch.allclose(in_turn.params[name], value, rtol=1e-4, atol=1e-5)
    together = with_options(step, window=2)(both, calib)
    assert sorted(together.record) == [1]
    assert set(together.clips) == set(both.linears())
    for done in (in_turn, together):
        assert (run_all(done, x) - calib.y_fp).abs().max() < 1e-4 * calib.y_fp.abs().max()


def test_a_fit_that_breaks_keeps_the_start_and_says_so(monkeypatch):
    real, calls = AffineFit.loss, []

    def loss(self, chosen):
        calls.append(0)
        value = real(self, chosen)
        return value * float("nan") if torch.is_grad_enabled() else value

    monkeypatch.setattr(AffineFit, "loss", loss)
    _, calib, done = trained(affine(epochs=4), "llama-odd")
    assert any("not finite" in note.text for note in done.notes)
    assert any("the starting point is kept" in note.text for note in done.notes)
    assert all(torch.isfinite(value).all() for value in done.params.values())
    assert (run_all(done, calib.x_fp) - calib.y_fp).abs().max() < 1e-4 * calib.y_fp.abs().max()


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before():
    torch.manual_seed(5)
    _, _, one = trained(affine(epochs=2), "qwen2")
    torch.manual_seed(6)
    _, _, two = trained(affine(epochs=2), "qwen2")
    assert all(torch.equal(one.params[key], two.params[key]) for key in one.params)
    assert one.record == two.record


def test_clips_follow_the_weights_into_any_rounding_step():
    block, calib, done = trained(affine(epochs=2), "llama-odd", W3)
    for linear in block.linears():
        qparams, format, weight = done.qparams(linear), done.weight_format(linear), done.weight(linear)
        assert (qparams.scale <= replace(done, clips={}).qparams(linear).scale).all()
        assert torch.equal(format.quantize(weight, qparams).dequantize(), format.fake_quant(weight, qparams))
    quantized = METHODS["gptq"]()(done, calib)
    assert torch.equal(quantized.qweights[linear].qparams.scale, qparams.scale)


def test_a_given_start_takes_scales_and_clips_of_the_step_before():
    block, calib = case("llama-odd", W3)
    before = METHODS["awq"]()(block, calib)
    trainer = fit_of(affine(start="given"), before, calib)
    assert all(torch.equal(trainer.start[key], value) for key, value in before.params.items())
    for name in block.linears():
        kept = before.clips.get(name, (torch.ones(()), torch.ones(())))  # AWQ leaves q and k alone
        for ratio, wanted in zip(trainer.clips[name].values(), kept, strict=True):
            assert torch.equal(ratio, wanted.expand(ratio.shape))
    done = affine(start="given", epochs=12, loss="mse", lr_maps=1e-2, lr_clips=0.1, held_out=0.0)(before, calib)
    assert output_error(done, calib) < output_error(before, calib)


@pytest.mark.parametrize("scheme", [W4A4, W3, "w4a16g16-sym"])
@pytest.mark.parametrize("before", [None, "awq", "affinequant"])
def test_a_given_start_of_no_epochs_changes_no_code(before, scheme):
    block, calib = case("llama-odd", scheme)
    if before is not None:
        block = METHODS[before]()(block, calib) if before == "awq" else affine(epochs=1)(block, calib)
    done = affine(start="given", act_clip=True, epochs=0)(block, calib)
    quantized = RTN()(block, calib), RTN()(done, calib)
    for linear, q in quantized[0].qweights.items():
        assert torch.equal(q.codes, quantized[1].qweights[linear].codes)
        assert torch.equal(q.qparams.scale, quantized[1].qweights[linear].qparams.scale)
    assert torch.equal(*(run_quantized(one, calib.x_q) for one in quantized))


def test_clips_of_inputs_start_where_the_step_before_left_them():
    block, calib = case("llama-odd")
    before = affine(act_clip=True, epochs=2, held_out=0.0)(block, calib)
    done = affine(act_clip=True, epochs=0, start="given")(before, calib)
    assert len(before.ops) == len(done.ops) == 7
    assert all(torch.equal(op.ratios, done.ops[name].ratios) for name, op in before.ops.items())


def test_without_learned_clips_training_and_result_keep_those_of_the_step_before():
    block, calib = case("llama-odd", W3)
    before = METHODS["awq"]()(block, calib)
    step = affine(clip=False, start="given", epochs=1, held_out=0.0)
    trainer = fit_of(step, before, calib)
    with torch.no_grad():
        start = trainer.quantized()[0]
    for linear, q in RTN()(before, calib).qweights.items():
        assert torch.equal(q.dequantize(), start[f"{linear}.weight"])
    assert set(step(before, calib).clips) == set(before.clips)


def test_aug_loss_adds_the_error_against_the_float_block_on_the_quantized_input():
    block, calib = case("llama-odd")
    x_q = calib.x_q + 0.1 * torch.randn(calib.x_q.shape, generator=torch.Generator().manual_seed(0))
    calib = Calib(calib.x_fp, x_q, calib.y_fp)
    chosen = torch.arange(2)
    with torch.no_grad():
        plain, twice = (float(fit_of(affine(aug_loss=w), block, calib).loss(chosen)) for w in (0.0, 2.0))
        trainer = fit_of(AffineQuant(), block, calib)
        y = run(block, x_q[chosen], trainer.quantized()[0], quantized=True)
        own = float(((y - run(block, x_q[chosen])).square().mean(-1, keepdim=True) / trainer.unit[chosen]).mean())
    assert twice == pytest.approx(plain + 2 * own, rel=1e-5)


def test_learned_clips_of_inputs_keep_the_rounding_offsets_of_a_step_before():
    block, calib = case("llama-odd")
    before = METHODS["reassemble"](theta="most", most=0.2, offsets="both")(block, calib)
    ((down, clip),) = before.ops.items()
    done = affine(act_clip=True, epochs=1)(before, calib)
    assert torch.equal(done.ops[down].offset, clip.offset)
    assert not torch.equal(done.ops[down].ratios, clip.ratios)


@pytest.mark.parametrize("start", ["smooth", "given"])
def test_a_matrix_is_refused_behind_a_norm_where_a_runtime_op_stands(start):
    block, calib = case("llama-odd")
    before = METHODS["reassemble"](sites="norms", theta="most", most=0.2)(block, calib)
    with pytest.raises(LowbitError, match=r"a gather follows the norm 1\.input_layernorm"):
        affine(qkv="matrix", mlp="matrix", start=start, epochs=1)(before, calib)


@pytest.mark.parametrize(
    "bad",
    [
        {"qkv": "dense"},
        {"channels": "matrix"},
        {"parametrisation": "qr"},
        {"mask": "late"},
        {"dominance": "on"},
        {"precision": "half"},
        {"stability": -1.0},
        {"condition": 1.0},
        {"epochs": -1},
        {"init_power": 1.5},
        {"init_peaks": "largest"},
        {"window": 0},
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(bad):
    with pytest.raises(LowbitError, match=next(iter(bad))):
        affine(**bad)


def test_nothing_to_quantize_means_nothing_to_learn():
    block, calib = case("llama")
    block = replace(block, formats={})
    assert AffineQuant()(block, calib) is block
