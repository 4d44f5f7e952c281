"""Refit: the least-squares answer, in execution order, and only where an input is not the float model's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.methods.lowrank import LowRank
from lowbit.methods.options import with_options
from lowbit.methods.refit import RIDGES, Refit, best_ridge, output_target
from lowbit.methods.rtn import RTN
from lowbit.methods.statistics import paired_statistics
from lowbit.models.block import Calib
from lowbit.models.forward import relative_error, run_all, run_quantized
from lowbit.models.runtime_ops import Clip
from lowbit.quant.scheme_names import parse_scheme, with_overrides
from tiny import NAMES, block_of, planned, tiny_model


@cache
def case(name="llama-odd", count=1, noise=0.3, start=1, scheme="w4a4"):
    """A block, and a quantized stream that is some way off the float one."""
    block, x = block_of(tiny_model(name), start, count)
    block = planned(block, scheme)
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return block, Calib(x, x + noise * x.std() * drawn, run_all(block, x))


def inputs(block, x, params, linear, quantized=False):
    """A linear's input, token by token, in float64."""
    seen = []
    run_all(block, x, params, quantized=quantized, taps={linear: lambda value: seen.append(value.flatten(0, -2))})
    return torch.cat(seen).double()


@pytest.mark.parametrize("tokens", ["unweighted", "normalized"])
@pytest.mark.parametrize("count", [1, 2])
def test_each_weight_is_the_ridge_regression_behind_the_refitted_and_quantized_linears_before_it(count, tokens):
    block, calib = case(count=count, start=0)
    done = Refit(ridge=0.5, search=False, tokens=tokens)(block, calib)
    shipped = dict(block.params)
    for group in block.linear_groups():
        x = inputs(block, calib.x_q, shipped, group[0], quantized=True)
        y = inputs(block, calib.x_fp, block.params, group[0])
        if tokens == "normalized":
            unit = x.square().mean(1, keepdim=True).sqrt()
            x, y = x / unit, y / unit
        for name in group:
            # One tall least-squares problem: the tokens, and the ridge as rows of their own.
            weight, hold = block.weight(name).double(), (0.5 * x.square().sum() / x.shape[1]).sqrt()
            tall = torch.cat([x, hold * torch.eye(x.shape[1], dtype=torch.float64)])
            answer = torch.linalg.lstsq(tall, torch.cat([y @ weight.T, hold * weight.T])).solution.T
            assert torch.allclose(done.weight(name).double(), answer, atol=1e-4 * float(answer.abs().max()))
            assert not torch.allclose(done.weight(name).double(), weight, atol=1e-2 * float(weight.abs().max()))
            shipped[f"{name}.weight"] = block.weight_format(name).fake_quant_clipped(done.weight(name))
    others = [name for name in block.params if name.removesuffix(".weight") not in block.linears()]
    assert all(torch.equal(done.params[name], block.params[name]) for name in others)


@pytest.mark.parametrize("name", NAMES)
def test_an_input_that_is_the_float_models_leaves_the_weights(name):
    """Behind float linears, with float inputs and one stream, nothing is to be made up for."""
    block, x = block_of(tiny_model(name), 1)
    calib = Calib(x, x, run_all(block, x))
    last = block.linears()[-1]
    block = planned(block, with_overrides(parse_scheme("w4a16"), {block.full_name(last): "w4", "*": "float"}))
    done = Refit()(block, calib)
    weight = block.weight(last)
    assert torch.allclose(done.weight(last), weight, atol=1e-5 * float(weight.abs().max()))
    assert done.record[1]["refit"][last]["relative_change"] < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_quantized_block_is_nearer_to_the_float_one(name):
    block, calib = case(name)
    errors = []
    for given in (block, Refit()(block, calib)):
        done = RTN()(given, calib)
        errors.append(relative_error(run_quantized(done, calib.x_q), calib.y_fp))
    assert errors[1] < errors[0]


def test_the_clips_and_runtime_ops_of_earlier_steps_count():
    block, calib = case()
    name = block.linear_groups()[0][0]
    later = block.linear_groups()[1][0]
    plain = Refit()(block, calib)
    clipped = Refit()(replace(block, clips={name: (torch.full((1, 1), 0.6), torch.full((1, 1), 0.6))}), calib)
    assert torch.equal(plain.weight(name), clipped.weight(name))  # the regression sees no rounding of its own weight
    assert not torch.equal(plain.weight(later), clipped.weight(later))
    shrunk = Refit()(replace(block, ops={name: Clip(torch.tensor([0.7, 0.7]))}), calib)
    assert not torch.equal(plain.weight(name), shrunk.weight(name))


def test_the_second_moments_are_those_of_a_loop_over_tokens():
    block, calib = case(noise=0.1)
    name = block.linears()[-1]
    moved = replace(
        block, params={**block.params, f"{block.linears()[0]}.weight": block.weight(block.linears()[0]) * 1.1}
    )
    seen = paired_statistics(moved, block, replace(calib, batch=1), [name], ("gram", "cross"))[name]
    x, y = inputs(block, calib.x_q, moved.params, name, quantized=True), inputs(block, calib.x_fp, block.params, name)
    wanted = sum(torch.outer(a, a) for a in x), sum(torch.outer(b, a) for a, b in zip(x, y, strict=True))
    for got, exact in zip((seen["gram"], seen["cross"]), wanted, strict=True):
        assert torch.allclose(got.double(), exact, atol=1e-4 * float(exact.abs().max()))


def test_the_answer_is_where_the_gradient_is_zero():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    found = output_target(weight, x.T @ x, y.T @ x, 0.3).requires_grad_()
    hold = 0.3 * x.square().sum() / 12
    ((y @ weight.T - x @ found.T).square().sum() + hold * (found - weight).square().sum()).backward()
    assert found.grad.abs().max() < 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_the_pull_is_the_one_whose_weight_errs_least_on_the_judging_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 20, 12, generator=generator, dtype=torch.float64)
    x = y + (0.2 + 0.3 * seed) * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    moments = [(a.T @ a, b.T @ a) for a, b in zip(x, y, strict=True)]
    errors = {
        ridge: float((y[1] @ weight.T - x[1] @ output_target(weight, *moments[0], ridge).T).square().sum())
        for ridge in RIDGES
    }
    assert best_ridge(weight, *moments, RIDGES) == min(errors, key=errors.get)


def test_the_search_judges_by_every_fourth_sequence_and_fits_all():
    block, calib = case()
    name = block.linears()[0]
    done = Refit()(block, calib)
    judging = torch.arange(len(calib.x_q)) % 4 == 3
    assert 0 < judging.sum() < len(judging)
    parts = [replace(calib, x_fp=calib.x_fp[some], x_q=calib.x_q[some]) for some in (~judging, judging)]
    weight = torch.cat([block.weight(one) for one in block.linear_groups()[0]])
    want = ("normalized_gram", "normalized_cross")
    seen = [paired_statistics(block, block, part, [name], want)[name] for part in parts]
    ridge = best_ridge(weight, *(tuple(one[figure] for figure in want) for one in seen), RIDGES)
    assert done.record[1]["refit"][name]["ridge"] == ridge
    given = Refit(ridge=ridge, search=False)(block, calib)
    assert torch.allclose(done.weight(name), given.weight(name), atol=1e-5)
    pulls = {figures["ridge"] for figures in done.record[1]["refit"].values()}
    assert len(pulls) > 1  # each input has its own


def test_one_sequence_cannot_judge_and_takes_the_pull_as_it_is():
    block, calib = case()
    one = replace(calib, x_fp=calib.x_fp[:1], x_q=calib.x_q[:1], y_fp=calib.y_fp[:1])
    done = Refit(ridge=0.7)(block, one)
    assert {figures["ridge"] for figures in done.record[1]["refit"].values()} == {0.7}


def test_the_correction_behind_starts_lower_and_ends_lower():
    block, calib = case(count=2, start=0)
    step = with_options(LowRank(), rank=4, epochs=2)
    plain, refitted = (step(given, calib) for given in (block, Refit()(block, calib)))
    without, with_it = (done.record[0]["lowrank"]["held_out"] for done in (plain, refitted))
    assert with_it[0] < without[0]
    assert min(with_it) < min(without)


@pytest.mark.parametrize("wrong", [{"tokens": "some"}, {"ridge": 0.0}, {"ridge": -1.0}])
def test_what_is_no_option_is_refused(wrong):
    with pytest.raises(LowbitError, match=f"refit[.:] ?{next(iter(wrong))}"):
        Refit(**wrong)


def test_an_expert_is_refitted_by_all_tokens_that_reach_it():
    """Not by those of the smaller part that the strength is chosen on: then without the choice."""
    block, x = block_of(tiny_model("mixtral"), 1)
    calib = Calib(
        x, x + 0.02 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), run_all(block, x)
    )
    block = planned(block, "w4a16")
    experts = [name for name in block.linears() if block.expert_of(name) is not None]
    splits = Refit()._splits(calib)
    parts = [paired_statistics(block, block, split, experts, ("cross",)) for split in splits]
    tokens = {name: [part[name].count for part in parts] for name in experts}
    name = max(experts, key=lambda name: min(tokens[name]))
    between = replace(block, least_tokens=int(0.8 * sum(tokens[name])))  # attention that is quantized moves some
    assert min(tokens[name]) < 0.5 * sum(tokens[name])
    done = Refit()(between, calib)
    assert done.record[1]["refit"][name]["ridge"] == Refit().ridge
    assert done.record[1]["refit"][name]["relative_change"] > 0
    assert name not in Refit()(replace(block, least_tokens=2 * sum(tokens[name])), calib).record[1]["refit"]
