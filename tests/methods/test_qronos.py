"""Qronos against its paper's argmins taken literally, and against GPTQ, from which it differs in one column."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.methods.gptq import GPTQ, inverse_factor
from lowbit.methods.gptq_columns import gptq_codes
from lowbit.methods.qronos import Qronos, corrected
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.quant.floating import MXFP4
from lowbit.quant.integer import IntFormat
from tiny import block_of, planned, tiny_model

RIDGE = 0.01


def problem(seed, rows=5, columns=32, tokens=60, drift=0.3):
    """A weight, and correlated inputs ``(tokens, in)`` of the float and of the quantized model, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    x = x * torch.logspace(-1, 1, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    noise = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x, x + drift * x.std() * noise


def order_of(x_q, act_order):
    strength = x_q.square().sum(0)
    return torch.argsort(strength, descending=True, stable=True) if act_order else torch.arange(x_q.shape[1])


def nearest(format, qparams, column, value):
    """The code of a column's values, and what it stands for."""
    own = type(qparams)(*(part[:, column] for part in format.per_column(qparams, 32)))
    code = format.round(value, own)
    return code, format.value(code, own)


def literal(weight, x, x_q, format, act_order, ridge=RIDGE):
    """Every step's two least-squares problems solved over the data, the ridge as rows of their own.

    ``argmin_p |W x - ...|^2`` over a grid is rounding of the unconstrained minimum: the objective is a parabola in p.
    """
    qparams, columns = format.qparams(weight), weight.shape[1]
    hold = (ridge * x_q.square().sum(0).mean()).sqrt() * torch.eye(columns, dtype=torch.float64)
    tall, wanted = torch.cat([x_q, hold]), torch.cat([x @ weight.T, hold @ weight.T])
    now, codes = weight.clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    left = order_of(x_q, act_order).tolist()
    while left:
        i = left.pop(0)
        others = now.clone()
        others[:, i] = 0
        rest = wanted - tall @ others.T
        best = (tall[:, i] @ rest) / tall[:, i].square().sum()
        code, now[:, i] = nearest(format, qparams, i, best)
        codes[:, i] = code.to(torch.uint8)
        if left:
            fixed = now.clone()
            fixed[:, left] = 0
            now[:, left] = torch.linalg.lstsq(tall[:, left], wanted - tall @ fixed.T).solution.T
    return codes


def codes_of(weight, x, x_q, format, act_order, block_size=128, first=True):
    """The codes by the step's own functions, with the qparams of ``weight``, as ``literal`` has them."""
    gram, order = x_q.T @ x_q, order_of(x_q, act_order)
    upper, used = inverse_factor(gram[order][:, order], RIDGE)
    assert used == RIDGE
    solved, start = corrected(weight, gram, x.T @ x_q, RIDGE, int(order[0]))
    start = start if first else None
    return gptq_codes(solved, upper, order, format.qparams(weight), format, block_size, start)


FORMATS = [IntFormat(3), IntFormat(2, 16, symmetric=False), IntFormat(4, 8, symmetric=False), MXFP4]


@pytest.mark.parametrize("block_size", [1, 3, 128])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_the_codes_are_those_of_the_papers_argmins(format, act_order, block_size):
    for seed in range(3):
        given = problem(seed)
        assert torch.equal(codes_of(*given, format, act_order, block_size), literal(*given, format, act_order))


def test_the_first_column_is_what_it_differs_in_from_the_least_squares_weight():
    given = problem(0)
    format = IntFormat(3)
    ours, plain = (codes_of(*given, format, True, first=first) for first in (True, False))
    first = int(order_of(given[2], True)[0])
    assert not torch.equal(ours[:, first], plain[:, first])


def test_with_the_float_models_input_it_is_gptq():
    weight, x, _ = problem(1)
    gram, order = x.T @ x, order_of(x, True)
    solved, first = corrected(weight, gram, gram, RIDGE, int(order[0]))
    assert torch.equal(solved, weight)
    assert torch.equal(first, weight[:, order[0]])


def test_inputs_that_are_always_zero_keep_their_weights():
    weight, x, x_q = problem(2)
    x_q[:, [0, 7]] = 0
    solved, _ = corrected(weight, x_q.T @ x_q, x.T @ x_q, RIDGE, 1)
    assert torch.equal(solved[:, [0, 7]], weight[:, [0, 7]])
    nothing = torch.zeros(32, 32, dtype=torch.float64)
    assert torch.equal(corrected(weight, nothing, nothing, RIDGE, 0)[0], weight)


def test_the_error_on_the_output_is_below_that_of_gptq():
    format = IntFormat(4, 16, symmetric=False)
    for seed in range(4):
        weight, x, x_q = problem(seed, tokens=200)
        gram, order = x_q.T @ x_q, order_of(x_q, True)
        upper, _ = inverse_factor(gram[order][:, order], RIDGE)
        plain = gptq_codes(weight, upper, order, format.qparams(weight), format, 128)
        errors = [
            float((x @ weight.T - x_q @ format.dequantize(codes, format.qparams(weight)).T).square().sum())
            for codes in (codes_of(weight, x, x_q, format, True), plain)
        ]
        assert errors[0] < 0.9 * errors[1], seed


@cache
def step_case(scheme):
    block, x = block_of(tiny_model("llama-odd"))
    block = planned(block, scheme)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return block, Calib(x, x + 0.3 * x.std() * noise, run_all(block, x))


def rows_of(x, x_q, tokens):
    """Tokens as rows, for ``normalized`` divided by the root mean square of the quantized model's."""
    x, x_q = x.flatten(0, -2).double(), x_q.flatten(0, -2).double()
    unit = x_q.square().mean(1, keepdim=True).sqrt() if tokens == "normalized" else 1.0
    return x / unit, x_q / unit


@pytest.mark.parametrize("tokens", ["unweighted", "normalized"])
def test_each_linear_reads_both_streams_behind_the_linears_quantized_before_it(tokens):
    block, calib = step_case("w4a8")
    done = Qronos(tokens=tokens)(block, calib)
    assert set(done.qweights) == set(block.formats)
    name = block.linear_groups()[1][0]  # o_proj, behind quantized linears
    upto = replace(block, qweights={linear: done.qweights[linear] for linear in block.linear_groups()[0]})
    got, wanted = [], []
    run_all(block, calib.x_q, upto.quantized_params(), quantized=True, taps={name: got.append})
    run_all(block, calib.x_fp, taps={name: wanted.append})
    x, x_q = rows_of(torch.cat(wanted), torch.cat(got), tokens)
    gram, cross = x_q.T @ x_q, x.T @ x_q
    order = order_of(x_q, True)
    ridge = Qronos().ridge
    solved, first = corrected(block.weight(name).double(), gram, cross, ridge, int(order[0]))
    upper, _ = inverse_factor(gram[order][:, order], ridge)
    format = block.weight_format(name)
    qparams = format.qparams(solved.float())
    expected = gptq_codes(solved, upper, order, type(qparams)(*(p.double() for p in qparams)), format, 128, first)
    assert (done.qweights[name].codes != expected).float().mean() < 0.01  # float32 sums in another order
    plain = GPTQ(tokens=tokens)(block, calib).qweights[name].codes
    assert (plain != expected).float().mean() > 0.05


@pytest.mark.parametrize("options", [{"ridge": 0.0}, {"block_size": 0}, {"tokens": "some"}])
def test_options_out_of_range(options):
    with pytest.raises(LowbitError, match=rf"qronos\.{next(iter(options))}"):
        Qronos(**options)
