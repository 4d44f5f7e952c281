"""Learned rounding: its parametrisations against literal ones, what it may change, what it keeps, and resuming."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from contracts import COLUMNS, hard_rows
from lowbit.errors import LowbitError
from lowbit.methods import METHODS, RTN
from lowbit.methods.gptq import GPTQ
from lowbit.methods.learned_codes import (
    PARAMETRISATIONS,
    GumbelChoice,
    SigmoidGates,
    SignOffsets,
    Start,
    latent_weight,
)
from lowbit.methods.learned_scales import LearnedScales
from lowbit.methods.options import with_options
from lowbit.methods.rounding import Rounding
from lowbit.methods.rounding_fit import RoundingFit, started, target
from lowbit.methods.rounding_options import RoundingOptions
from lowbit.methods.sign_descent import SignDescent
from lowbit.methods.training import Schedule, fit, loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run_all, run_quantized
from lowbit.quant.format import Format, QParams, QTensor
from lowbit.quant.formats import FORMATS
from lowbit.quant.integer import IntFormat
from tiny import block_of, planned, tiny_model

W2 = IntFormat(2, 16, symmetric=False)
EXAMPLES = [format for kind in FORMATS.values() for format in kind.examples()]
NOISE = torch.Generator()


@cache
def case(scheme: str = "w2a16g16-asym", family: str = "llama") -> tuple[Block, Calib]:
    block, x = block_of(tiny_model(family), 1, 1)
    block = planned(block, scheme)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    return block, Calib(x, x + 0.02 * x.std() * noise, run_all(block, x))


def rounding(**options) -> Rounding:
    return with_options(Rounding(), **{"epochs": 4, "held_out": 0.25, **options})


def figures(done: Block) -> dict:
    return done.record[done.start]["rounding"]


def errors(block: Block, calib: Calib, chosen: torch.Tensor, correct: float) -> float:
    wanted = target(block, calib, correct)[chosen]
    got = run_quantized(block, calib.x_q[chosen])
    return float(relative_loss(got, wanted, loss_unit(wanted, "token")))


def weights(rows: int = 6, columns: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2), dtype=dtype)


def start_of(weight: torch.Tensor, format: Format = W2, bound: float = 0.5) -> Start:
    return Start(weight, format.qparams(weight), format, bound)


# The parametrisations against literal ones.


def straight(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()


def literal_signround(weight, x, steps, learn_scales):
    """SignRound as AutoRound trains it, one matrix, groups of 16, 2 bits: no code of the library."""
    grouped = weight.reshape(weight.shape[0], -1, 16)
    bottom, top = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    offset = torch.zeros_like(weight).requires_grad_()
    low, high = (torch.ones_like(bottom).requires_grad_() for _ in range(2))

    def quantized():
        scale = (top * high - bottom * low) / 3
        scale = scale + (scale.half().float() - scale).detach()
        zero = straight(-bottom * low / scale).clamp(0, 3)
        scale, zero = (value.repeat_interleave(16, 1) for value in (scale, zero))
        return ((straight(weight / scale + offset) + zero).clamp(0, 3) - zero) * scale

    for step in range(steps):
        for leaf in (offset, low, high):
            leaf.grad = None
        (x @ (quantized() - weight).T).square().mean().backward()
        with torch.no_grad():
            rate = (1 - step / steps) / steps
            offset.copy_((offset - rate * offset.grad.sign()).clamp(-0.5, 0.5))
            for ratio in (low, high) if learn_scales else ():
                ratio.copy_((ratio - rate * ratio.grad.sign()).clamp(0.1, 1))
    return quantized().detach()


@pytest.mark.parametrize("learn_scales", [False, True])
def test_sign_offsets_are_signround_step_by_step(learn_scales):
    weight, x = weights(), torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    block = planned(case()[0], "w2a16g16-asym")
    name = block.quantized_linears()[0]
    block = replace(block, params={**block.params, f"{name}.weight": weight}, clips={})
    codes = SignOffsets(start_of(weight))
    scales = LearnedScales.of(block, name, codes.start.qparams, learn_scales, ends=True)
    groups = [(codes.leaves, 1 / 12), (scales.ratios, 1 / 12)]

    def loss(chosen):
        return (x @ (codes.values(scales.qparams(), 0.0, NOISE) - weight).T).square().mean()

    def project():
        codes.project()
        scales.project()

    fit(groups, loss, 3, Schedule(4, held_out=0.0, decay="linear"), project=project, optimizer=SignDescent)
    wanted = literal_signround(weight, x, 12, learn_scales)
    assert torch.equal(codes.chosen(scales.qparams()), wanted)
    assert not torch.equal(wanted, W2.fake_quant(weight, codes.start.qparams))


def fused_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    weight, offset = (torch.randn(4, 32, generator=generator, dtype=dtype) for _ in range(2))
    q = W2.qparams(weight, 0.7, 0.6)  # clipped: some weights are outside
    return weight, (0.3 * offset).requires_grad_(), *(value.clone().requires_grad_() for value in q)


def test_the_fused_rounding_of_integers_is_the_formats_own_with_its_gradients():
    weight, offset, scale, zero = fused_inputs()
    upstream = torch.randn(4, 32, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    found = []
    for function in (W2.fake_quant_shifted, lambda *given: Format.fake_quant_shifted(W2, *given)):
        value = function(weight, offset, QParams(scale, zero))
        grads = torch.autograd.grad((value * upstream).sum(), (offset, scale, zero))
        found.append((value, *grads))
    for ours, generic in zip(*found, strict=True):
        assert torch.allclose(ours, generic, atol=1e-12)
    assert all(float(grad.abs().sum()) > 0 for grad in found[0][1:])


@pytest.mark.parametrize("kind", [SigmoidGates, GumbelChoice])
def test_gradients_of_soft_codes_are_those_of_finite_differences(kind):
    weight = weights(dtype=torch.float64)
    start = start_of(weight)
    codes = kind(start)
    (leaf,) = codes.leaves
    field = "logit" if kind is SigmoidGates else "logits"

    def values(logits, scale):
        setattr(codes, field, logits)
        noise = torch.Generator().manual_seed(1)
        return codes.values(QParams(scale, start.qparams.zero), 0.3, noise)

    inputs = (leaf.detach().clone().requires_grad_(), start.qparams.scale.clone().requires_grad_())
    assert torch.autograd.gradcheck(values, inputs)


def test_gates_are_adarounds():
    weight = torch.tensor([[-1.0, 0.25, 0.6, 2.0]])
    start = start_of(weight, IntFormat(2, symmetric=False))  # scale 1, zero 1: positions 0, 1.25, 1.6, 3
    gates = SigmoidGates(start)
    assert gates.lower.tolist()[0][1:3] == [1.0, 1.0]
    assert torch.allclose(gates.gates()[0, 1:3], torch.tensor([0.25, 0.4 + 0.2]), atol=1e-6)
    with torch.no_grad():
        gates.logit.copy_(torch.tensor([[0.0, 1.0, -9.0, 9.0]]))
    wanted = torch.tensor([0.5, 1.2 * torch.sigmoid(torch.tensor(1.0)) - 0.1, 0.0, 1.0])
    assert torch.allclose(gates.gates()[0], wanted)
    assert gates.penalty(0.1) is None
    room = torch.tensor([1.0, 1.0, 1.0, 1.0]) * gates.room[0]
    for progress, beta in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        literal = (room * (1 - (2 * wanted - 1).abs() ** beta)).sum()
        assert float(gates.penalty(progress).detach()) == pytest.approx(float(literal), rel=1e-5)


def test_a_gumbel_choice_is_a_softmax_of_logits_with_noise_over_values():
    weight = weights()
    start = start_of(weight, bound=1.0)
    choice = GumbelChoice(start)
    codes, _ = start.neighbours()
    assert len(codes) == 3
    got = choice.values(start.qparams, 0.5, torch.Generator().manual_seed(5))
    drawn = torch.empty(3, 6, 32).exponential_(generator=torch.Generator().manual_seed(5))
    scores = ((3.0 * choice.logits - drawn.log()) / 1.025).exp()
    column = start.per_column
    open_ = choice.closed == 0
    share = scores * open_ / (scores * open_).sum(0)
    wanted = (share * (codes - column.zero) * column.scale).sum(0)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_a_sign_step_is_the_rate_whatever_the_gradient_and_momentum_the_running_mean():
    x = torch.zeros(2, requires_grad=True)
    descent = SignDescent([([x], 0.5)], momentum=0.9)
    for gradient in ([1.0, 1e-8], [-5.0, 1e-8]):
        x.grad = torch.tensor(gradient)
        descent.step(0.5)
    assert x.tolist() == [-0.25 + 0.25, -0.5]  # 0.09 - 0.5 < 0: the mean has turned


# Formats.


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
@pytest.mark.parametrize("format", EXAMPLES, ids=lambda format: format.name)
def test_learning_starts_at_the_given_codes_in_every_format(format, kind):
    weight = hard_rows(torch.float32, COLUMNS)
    qparams = format.qparams(weight, 0.9, 0.9)
    nearest = format.quantize(weight, qparams)
    # Every third weight has the next code, as far as the format has one: what error compensation does.
    column = format.per_column(qparams, COLUMNS)
    step = (torch.arange(COLUMNS) % 3 == 0).float()
    given = format.round(format.value(nearest.codes + step, column), column).to(torch.uint8)
    assert not torch.equal(given, nearest.codes)
    for codes in (nearest.codes, given):
        q = QTensor(codes, qparams, format)
        latent = latent_weight(weight, q)
        assert torch.equal(format.quantize(latent, qparams).codes, codes)
        learned = PARAMETRISATIONS[kind](Start(latent, qparams, format))
        values = learned.chosen(qparams)
        assert torch.equal(values, q.dequantize())
        assert torch.equal(format.quantize(values, qparams).codes, codes)
        trained = learned.values(qparams, 0.5, torch.Generator().manual_seed(0))
        (grad,) = torch.autograd.grad(trained.square().sum(), learned.leaves)
        assert bool(grad.isfinite().all())
        assert float(grad.abs().sum()) > 0
    assert torch.equal(latent_weight(weight, nearest), weight)


@pytest.mark.parametrize("format", EXAMPLES, ids=lambda format: format.name)
def test_neighbours_are_codes_of_the_format_and_the_nearest_come_first(format):
    weight = hard_rows(torch.float32, COLUMNS)
    start = start_of(weight, format, bound=1.5)
    codes, distances = start.neighbours()
    assert len(codes) == 4
    assert torch.equal(codes[0], format.quantize(weight, start.qparams).codes.float())
    assert torch.equal(format.round(format.value(codes, start.per_column), start.per_column), codes)
    known = distances[1:].isfinite() & (distances[0] <= 0.5)  # without weights outside the range
    assert bool((distances[1:] <= 2 + 1e-3)[known].all())
    assert bool((distances[1:] >= 0.5 - 1e-3)[known].all())


@pytest.mark.parametrize("scheme", ["w4a8", "w3a16-asym", "nvfp4a16", "mxfp4", "fp8", "iq4_nl"])
@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_only_neighbours_are_chosen(scheme, kind):
    block, calib = case(scheme)
    done = rounding(parametrisation=kind, lr=3.0, held_out=0.0, scales=False)(block, calib)
    assert 0 < figures(done)["changed_codes"] < 0.6
    for name, q in done.qweights.items():
        weight, format = block.weight(name), q.format
        column = format.per_column(q.qparams, weight.shape[1])
        nearest = format.round(weight, column)
        away = q.codes.float() - nearest
        assert int(away.abs().max()) <= 1
        assert bool(((away == 0) | (torch.sign(format.position(weight, column) - nearest) == away)).all())


def test_a_wider_bound_reaches_more_codes():
    block, calib = case("w4a16")
    furthest = []
    for bound in (0.5, 2.0):
        done = rounding(bound=bound, lr=20.0, held_out=0.0, scales=False)(block, calib)
        steps = [q.codes.float() - RTN()(block, calib).qweights[name].codes for name, q in done.qweights.items()]
        furthest.append(max(int(step.abs().max()) for step in steps))
    assert furthest == [1, 2]


# Learning.


@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_the_error_falls_below_that_of_the_start(kind, start):
    block, calib = case("w3a16g16-asym")
    _, held = Schedule(held_out=0.25).split(len(calib.x_q))
    for correct in (1.0, 0.5):
        done = rounding(parametrisation=kind, start=start, epochs=8, correct=correct)(block, calib)
        before = figures(done)["held_out"][0]
        assert errors(done, calib, held, correct) == pytest.approx(min(figures(done)["held_out"]), rel=1e-4)
        assert errors(done, calib, held, correct) <= before
        if start == "nearest" and kind == "sign":
            assert errors(done, calib, held, correct) < 0.9 * before


def test_the_target_is_between_the_float_models_output_and_the_blocks_own():
    block, calib = case("w3a16g16-asym")
    own = run_all(block, calib.x_q)
    assert torch.equal(target(block, calib, 1.0), calib.y_fp)
    assert torch.equal(target(block, calib, 0.0), own)
    assert torch.allclose(target(block, calib, 0.25), 0.25 * calib.y_fp + 0.75 * own, atol=1e-5)
    assert not torch.allclose(own, calib.y_fp, atol=1e-3)


def test_rates_are_for_the_steps_that_are_taken():
    """An epoch of two of six sequences is two steps: offsets can reach their bound all the same."""
    block, calib = case("w3a16g16-asym")
    fits = []
    for schedule in (Schedule(epochs=12, sequences=2, decay="linear"), Schedule(epochs=4, decay="linear")):
        trainer = RoundingFit(RoundingOptions(), schedule, block, calib)
        fits.append((trainer.steps, [rate for _, rate in trainer.groups()]))
    assert fits[0][0] == 24
    assert fits[0][1][0] == pytest.approx(1 / 24)
    assert fits[1][1][0] == pytest.approx(1 / fits[1][0])


@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_without_a_better_epoch_the_codes_of_the_start_are_kept(kind, start):
    block, calib = case("w4a8")
    options = rounding(parametrisation=kind, start=start, lr=1e4, epochs=2)
    done = options(block, calib)
    assert figures(done)["best_epoch"] == 0
    assert "the codes of the start are kept" in done.notes[-1].text
    train, _ = options.schedule.split(len(calib.x_q))
    streams = {name: getattr(calib, name)[train] for name in ("x_fp", "x_q", "y_fp")}
    first = (RTN() if start == "nearest" else GPTQ())(block, replace(calib, **streams))
    for name, q in done.qweights.items():
        assert torch.equal(q.codes, first.qweights[name].codes)
        assert torch.equal(q.dequantize(), first.qweights[name].dequantize())


def test_the_start_sees_nothing_of_the_validation_split():
    block, calib = case("w4a16g16-sym")
    options = rounding(start="gptq")
    _, held = options.schedule.split(len(calib.x_q))
    spoilt = replace(calib, x_q=calib.x_q.clone())
    spoilt.x_q[held] = torch.nan
    one, other = (started(options.options, options.schedule, block, given)[0].qweights for given in (calib, spoilt))
    assert all(torch.equal(one[name].codes, other[name].codes) for name in one)


def test_scales_are_learned_where_asked_and_only_there():
    block, calib = case("w2a16g16-asym")
    start = RTN()(block, calib).qweights
    for scales in (False, True):
        done = rounding(scales=scales, held_out=0.0)(block, calib)
        same = [torch.equal(q.qparams.scale, start[name].qparams.scale) for name, q in done.qweights.items()]
        assert same == [not scales] * len(same)


def test_a_clipped_range_may_grow_to_the_weights_own():
    block, _ = case("w4a16g16-sym")
    name = block.quantized_linears()[0]
    clipped = replace(block, clips={name: (torch.tensor(0.5), torch.tensor(0.8))})
    scales = LearnedScales.of(clipped, name, clipped.qparams(name), learn=True, ends=True)
    with torch.no_grad():
        for ratio in scales.ratios:
            ratio.fill_(9.0)
        scales.project()
    assert all(torch.equal(ratio, torch.full_like(ratio, 1.25)) for ratio in scales.ratios)
    assert bool((scales.qparams().scale <= block.qparams(name).scale * (1 + 1e-3)).all())


# Resuming, options.


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_a_fit_that_is_resumed_ends_with_the_same_bytes(kind, tmp_path):
    block, calib = case("w3a16g16-asym")
    options = rounding(parametrisation=kind, epochs=3)

    def learned(keep=None, stop_at=None):
        trainer = RoundingFit(options.options, options.schedule, block, calib)

        def begin(epoch):
            if epoch == stop_at:
                raise KeyboardInterrupt
            trainer.begin(epoch)

        arguments = (trainer.groups(), trainer.loss, len(calib.x_q), options.schedule, 0, begin, trainer.project)
        fitted = fit(*arguments, keep=keep, optimizer=trainer.optimizer)
        return trainer.fold(replace(fitted, best=max(fitted.best, 1)))

    whole = learned()
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "state.safetensors", stop_at=3)
    resumed = learned(tmp_path / "state.safetensors")
    for name, q in whole.qweights.items():
        assert torch.equal(resumed.qweights[name].codes, q.codes)
        assert torch.equal(resumed.qweights[name].dequantize(), q.dequantize())
    assert figures(resumed) == figures(whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parametrisation": "soft"}, "rounding.parametrisation"),
        ({"start": "awq"}, "rounding.start"),
        ({"bound": 0.0}, "rounding.bound 0 given; it must be above 0"),
        ({"lr": -1.0}, "rounding.lr -1 given"),
        ({"parametrisation": "sigmoid", "bound": 1.0}, "sigmoid decides between two codes: set 0.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(LowbitError, match=said):
        rounding(**options)


def test_experts_that_too_few_tokens_reach_are_not_learned():
    block, calib = case("w4a8", "mixtral")
    block = replace(block, least_tokens=10**6)
    done = rounding(epochs=1)(block, calib)
    assert any("codes not learned" in note.text for note in done.notes)
    assert set(done.qweights) == set(block.formats)
    assert METHODS["rounding"] is Rounding
