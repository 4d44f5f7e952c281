"""GPTQ against a literal transcription of the algorithm, and what it does at the edges."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.methods import gptq
from lowbit.methods.damping import damping_of
from lowbit.methods.gptq import GPTQ, inverse_factor
from lowbit.methods.gptq_columns import gptq_codes
from lowbit.methods.statistics import Statistics
from lowbit.models.block import Calib, Note
from lowbit.models.forward import run_all
from lowbit.models.runtime_ops import Clip
from lowbit.quant.activations import IntTokens
from lowbit.quant.format import QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme_names import parse_scheme, with_overrides
from tiny import block_of, planned, tiny_model


def problem(seed, rows=7, columns=32, tokens=40):
    """A weight and the second moments of strongly correlated inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    x = x * torch.logspace(-1, 1, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def order_of(gram, act_order):
    return torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(gram))


def codes_of(weight, gram, format, act_order=True, block_size=128, damping=0.01):
    order = order_of(gram, act_order)
    upper, used = inverse_factor(gram[order][:, order], damping)
    assert used == damping
    return gptq_codes(weight, upper, order, format.qparams(weight), format, block_size)


def nearest(weight, format):
    """Round to nearest."""
    return format.quantize(weight, format.qparams(weight)).codes


def literal(weight, gram, format, act_order, damping=0.01):
    """Optimal Brain Quantization in a fixed order: equations 2 and 3 of arXiv 2210.17323, one column at a time."""
    weight, columns = weight.clone(), gram.shape[0]
    qparams = format.qparams(weight)
    size = columns // format.groups(columns)
    inverse = torch.linalg.inv(gram + damping * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype))
    codes = torch.zeros_like(weight)
    left = order_of(gram, act_order).tolist()
    while left:
        i = left.pop(0)
        scale, zero = qparams.scale[:, i // size], qparams.zero[:, i // size]
        codes[:, i] = ((weight[:, i] / scale).round() + zero).clamp(0, format.levels)
        error = weight[:, i] - (codes[:, i] - zero) * scale
        for j in left:
            weight[:, j] -= error * inverse[i, j] / inverse[i, i]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("block_size", [1, 3, 128])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("format", [IntFormat(3), IntFormat(4, 8, symmetric=False), IntFormat(2, 16), IntFormat(8)])
def test_the_codes_are_those_of_the_literal_algorithm(format, act_order, block_size):
    for seed in range(3):
        weight, gram = problem(seed)
        wanted = literal(weight, gram, format, act_order)
        assert torch.equal(codes_of(weight, gram, format, act_order, block_size), wanted)
        assert not torch.equal(wanted, nearest(weight, format))


def test_the_order_matters_and_the_default_takes_strong_inputs_first():
    weight, gram = problem(0)
    format = IntFormat(3)
    assert not torch.equal(literal(weight, gram, format, True), literal(weight, gram, format, False))
    first = int(gram.diagonal().argmax())
    plain = nearest(weight, format)
    assert torch.equal(codes_of(weight, gram, format)[:, first], plain[:, first]), (
        "the first column has no errors yet"
    )


@pytest.mark.parametrize("act_order", [True, False])
def test_inputs_that_do_not_correlate_give_round_to_nearest(act_order):
    weight, _ = problem(1)
    format = IntFormat(3, 8)
    wanted = nearest(weight, format)
    for gram in (torch.eye(32, dtype=torch.float64), torch.diag(torch.linspace(1, 9, 32, dtype=torch.float64))):
        assert torch.equal(codes_of(weight, gram, format, act_order), wanted)


@pytest.mark.parametrize("strength", [1e-6, 1.0])
@pytest.mark.parametrize("act_order", [True, False])
def test_columns_whose_input_was_always_zero_are_rounded_to_nearest_and_disturb_nobody(act_order, strength):
    weight, gram = problem(2)
    gram = gram * strength
    dead = torch.tensor([0, 5, 6, 31])
    live = torch.tensor([i for i in range(32) if i not in dead])
    gram[dead], gram[:, dead] = 0, 0
    format = IntFormat(3)
    codes = codes_of(weight, gram, format, act_order)
    assert torch.equal(codes[:, dead], nearest(weight, format)[:, dead])
    alone = gram[live][:, live]
    order = order_of(alone, act_order)
    upper, _ = inverse_factor(alone[order][:, order], 0.01)
    # Damping is a share of the mean over live columns, so the rest is the smaller problem with the same qparams.
    wanted = gptq_codes(weight[:, live], upper, order, format.qparams(weight), format, 128)
    assert torch.equal(codes[:, live], wanted)


def test_no_data_at_all_is_round_to_nearest():
    weight, gram = problem(3)
    format = IntFormat(4)
    assert torch.equal(codes_of(weight, torch.zeros_like(gram), format), nearest(weight, format))


def test_the_factor_is_the_inverses_and_a_bad_matrix_raises_the_damping():
    _, gram = problem(4)
    upper, damping = inverse_factor(gram, 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(32, dtype=torch.float64), atol=1e-9, rtol=0)
    # One eigenvalue at -0.5 of the diagonal's mean: 0.01 and 0.1 of it do not suffice, 1 does.
    values, vectors = torch.linalg.eigh(gram)
    values[0] = 0
    values = values / values.mean()
    values[0], values[1] = -0.5, values[1] + 0.5
    bad = vectors * values @ vectors.T
    upper, damping = inverse_factor(bad, 0.01)
    assert damping == pytest.approx(1.0)
    assert bool(torch.isfinite(upper).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_an_error(bad):
    _, gram = problem(4)
    gram[3, 3] = bad
    with pytest.raises(LowbitError, match="contain NaN or infinity"):
        inverse_factor(gram, 0.01)


@pytest.mark.parametrize("format", [IntFormat(2), IntFormat(3, 8, symmetric=False), IntFormat(4), IntFormat(8)])
def test_the_error_is_below_that_of_round_to_nearest(format):
    for seed in range(5):
        weight, gram = problem(seed)
        errors = []
        for codes in (codes_of(weight, gram, format), nearest(weight, format)):
            delta = QTensor(codes, format.qparams(weight), format).dequantize() - weight
            errors.append(float(((delta @ gram) * delta).sum()))
        assert errors[0] < 0.9 * errors[1], seed


@cache
def step_case(scheme="w4a16"):
    block, x = block_of(tiny_model("llama-odd"))
    block = planned(block, scheme)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return block, Calib(x, x + 0.05 * noise, run_all(block, x))


def test_the_step_notes_a_damping_that_was_raised_and_only_then(monkeypatch):
    block, calib = step_case(with_overrides(parse_scheme("w4a16"), {"*.mlp.*": "float", "*.o_proj": "float"}))
    assert GPTQ()(block, calib).notes == ()

    def indefinite(block, x, linears, *args, **kwargs):
        gram = torch.eye(64)
        gram[0, 1] = gram[1, 0] = 1.5  # eigenvalues 2.5 and -0.5
        return {name: Statistics((), values={"normalized_gram": gram}, count=1) for name in linears}

    monkeypatch.setattr(gptq, "input_statistics", indefinite)
    (note,) = GPTQ(shrinkage=0)(replace(block, notes=()), calib).notes
    names = "0.self_attn.q_proj, 0.self_attn.k_proj, 0.self_attn.v_proj"
    assert note == Note(0, f"gptq: damping raised from 0.01 to 1 for {names}")


def rows_of(x, tokens):
    """Tokens as rows; for ``normalized`` each divided by its root mean square."""
    rows = x.flatten(0, -2)
    return rows if tokens == "unweighted" else rows / rows.square().mean(1, keepdim=True).sqrt()


@cache
def mixed_case():
    """Linears that read one tensor in different ways: left float, in another format, behind a clip of its own."""
    block, calib = step_case("w4a4")
    formats = {name: own for name, own in block.formats.items() if name != "0.self_attn.q_proj"}
    formats["0.self_attn.v_proj"] = replace(formats["0.self_attn.v_proj"], input=IntTokens(8, symmetric=False))
    return replace(block, formats=formats, ops={"0.mlp.up_proj": Clip(torch.tensor([0.7, 0.6]))}), calib


@pytest.mark.parametrize("tokens", ["unweighted", "normalized"])
@pytest.mark.parametrize("name", ["w4a16", "w4a8", "w4a16kv4", "mixed"])
def test_each_linear_is_quantized_for_its_input_in_the_model_quantized_up_to_it(name, tokens):
    block, calib = mixed_case() if name == "mixed" else step_case(name)
    done = GPTQ(tokens=tokens)(block, calib)
    for position, group in enumerate(block.linear_groups()):
        earlier = [linear for previous in block.linear_groups()[:position] for linear in previous]
        upto = replace(block, qweights={n: done.qweights[n] for n in earlier if n in done.qweights})
        seen = {linear: [] for linear in group}
        taps = {linear: inputs.append for linear, inputs in seen.items()}
        run_all(block, calib.x_q, upto.quantized_params(), quantized=True, taps=taps)
        for linear in set(group) & set(block.formats):
            # The sums are taken as the step takes them, batch by batch in float32: another order rounds differently.
            gram = sum(rows_of(x, tokens).T @ rows_of(x, tokens) for x in seen[linear])
            damping = 0.01 + gram.shape[0] / calib.x_q.shape[:2].numel()
            wanted = codes_of(block.weight(linear), gram, block.weight_format(linear), damping=damping)
            assert torch.equal(done.qweights[linear].codes, wanted), linear
    if name == "mixed":
        assert set(done.qweights) == set(block.formats)


def test_the_qparams_are_those_of_the_clips():
    block, calib = step_case("w4a16g8-asym")
    clips = {linear: (torch.full((1, 1), 0.7), torch.full((1, 1), 0.6)) for linear in block.linears()}
    done = GPTQ()(replace(block, clips=clips), calib)
    for linear, q in done.qweights.items():
        wanted = q.format.qparams(block.weight(linear), 0.7, 0.6)
        assert torch.equal(q.qparams.scale, wanted.scale)
        assert torch.equal(q.qparams.zero, wanted.zero)


def unseen_error(tokens, shrinkage):
    """Squared error of the output on tokens that were not calibrated on, relative to that of round to nearest."""
    generator = torch.Generator().manual_seed(tokens)
    mix = torch.randn(64, 64, generator=generator, dtype=torch.float64) / 8
    weight = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    x, unseen = (torch.randn(rows, 64, generator=generator, dtype=torch.float64) @ mix for rows in (tokens, 4096))
    gram, truth, format = x.T @ x, unseen.T @ unseen, IntFormat(3)
    errors = []
    for codes in (
        codes_of(weight, gram, format, damping=damping_of(0.01, shrinkage, 64, tokens)),
        nearest(weight, format),
    ):
        delta = QTensor(codes, format.qparams(weight), format).dequantize() - weight
        errors.append(float(((delta @ truth) * delta).sum()))
    return errors[0] / errors[1]


@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_where_tokens_are_few_shrinkage_lowers_the_error_on_others(tokens):
    """The paper's 0.01 alone fits the sample: with as many tokens as inputs it is worse than rounding to nearest."""
    plain, shrunk = unseen_error(tokens, 0), unseen_error(tokens, 1)
    assert shrunk < min(plain, 1.0)


def test_with_many_tokens_shrinkage_changes_little():
    assert unseen_error(8192, 1) == pytest.approx(unseen_error(8192, 0), rel=0.03)


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": -1.0}, {"shrinkage": -1.0}, {"block_size": 0}])
def test_options_out_of_range(options):
    ((name, value),) = options.items()
    with pytest.raises(LowbitError, match=rf"gptq\.{name} {value:g} given; it must be"):
        GPTQ(**options)


@pytest.mark.parametrize("tokens", ["unweighted", "normalized"])
def test_towards_the_output_the_weights_are_first_moved_to_the_least_squares_answer(tokens):
    block, calib = step_case("w4a8")
    # Far from the float stream, as behind many blocks.
    calib = replace(calib, x_q=calib.x_q + 0.3 * torch.randn(calib.x_q.shape, generator=torch.manual_seed(1)))
    done = GPTQ(tokens=tokens, target="output", ridge=0.1, shrinkage=0)(block, calib)
    name = block.linear_groups()[1][0]  # o_proj, behind quantized linears
    upto = replace(block, qweights={linear: done.qweights[linear] for linear in block.linear_groups()[0]})
    got, wanted = [], []
    run_all(block, calib.x_q, upto.quantized_params(), quantized=True, taps={name: got.append})
    run_all(block, calib.x_fp, taps={name: wanted.append})
    x, y = rows_of(torch.cat(got), "unweighted").double(), rows_of(torch.cat(wanted), "unweighted").double()
    if tokens == "normalized":
        unit = x.square().mean(1, keepdim=True).sqrt()
        x, y = x / unit, y / unit
    # A ridge regression as one tall least-squares problem: tokens, and the ridge as rows of their own.
    weight, hold = block.weight(name).double(), (0.1 * (x.square().sum() / x.shape[1])).sqrt()
    tall = torch.cat([x, hold * torch.eye(x.shape[1], dtype=torch.float64)])
    answer = torch.linalg.lstsq(tall, torch.cat([y @ weight.T, hold * weight.T])).solution.T
    format = block.weight_format(name)
    moved = codes_of(answer.float(), (x.T @ x).float(), format)
    assert (done.qweights[name].codes != moved).float().mean() < 0.01  # float32 sums in another order
    assert (codes_of(weight.float(), (x.T @ x).float(), format) != moved).float().mean() > 0.05


def test_what_is_no_option_is_refused():
    for wrong in ({"tokens": "some"}, {"target": "loss"}, {"ridge": 0.0}):
        with pytest.raises(LowbitError, match=rf"gptq\.{next(iter(wrong))}"):
            GPTQ(**wrong)
