"""Rounding left out by chance: where it is, where it is not, and that a fit with it repeats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.block import Calib, run, run_all
from lowbit.drop import Drop
from lowbit.errors import LowbitError
from lowbit.methods.affinequant import AffineQuant, Trainer
from lowbit.methods.lowrank import LowRank
from lowbit.scheme import parse_scheme
from tiny import block_of, tiny_model

CPU = torch.device("cpu")
W4A4, W4 = parse_scheme("w4a4"), parse_scheme("w4a16-asym")
METHODS = [LowRank(epochs=2, drop=0.5), AffineQuant(epochs=2, drop=0.5)]


def case(name="llama-odd"):
    block, x = block_of(tiny_model(name), 1, 1)
    return block, Calib(x, x, run_all(block, x))


def test_a_share_stays_float_and_both_have_gradients():
    x = torch.linspace(-1, 1, 40_000).requires_grad_()
    rounded = x + (x.round() - x).detach()
    seen = Drop(0.25, CPU, 3)(x, rounded)
    assert bool(((seen == x) | (seen == rounded)).all())
    assert float((seen == x).float().mean()) == pytest.approx(0.25, abs=0.02)
    (grad,) = torch.autograd.grad(seen.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


def test_all_is_rounded_where_nothing_is_learned():
    x, rounded = torch.rand(50), torch.zeros(50)
    assert Drop(0.0, CPU, 0)(x, rounded) is rounded
    with torch.no_grad():
        assert Drop(0.9, CPU, 0)(x, rounded) is rounded
    block, calib = case()
    trainer = Trainer(AffineQuant(drop=0.9), block, calib, W4A4)
    with torch.no_grad():
        params, _ = trainer.quantized()
        held_out = trainer.loss(torch.arange(len(calib.x_q)))
        trainer.drop.share = 0.0
        assert torch.equal(held_out, trainer.loss(torch.arange(len(calib.x_q))))
        assert not torch.equal(run(block, calib.x_q, params, W4A4), run(block, calib.x_q, params))


def test_linears_that_read_one_input_see_one_draw():
    block, calib = case()
    found: dict[str, torch.Tensor] = {}
    taps = {name: lambda value, name=name: found.__setitem__(name, value) for name in block.linears()}
    run(block, calib.x_q, None, W4A4, taps, seen=Drop(0.5, CPU, 0))
    plain: dict[str, torch.Tensor] = {}
    taps = {name: lambda value, name=name: plain.__setitem__(name, value) for name in block.linears()}
    run(block, calib.x_q, None, W4A4, taps)
    for group in block.linear_groups():
        assert all(torch.equal(found[name], found[group[0]]) for name in group), group
        assert not torch.equal(found[group[0]], plain[group[0]])


@pytest.mark.parametrize("method", METHODS, ids=["lowrank", "affinequant"])
def test_a_fit_repeats_and_differs_from_one_without(method):
    block, calib = case()
    done = [m(block, calib, W4A4).params for m in (method, method, replace(method, drop=0.0))]
    assert all(torch.equal(done[0][name], done[1][name]) for name in done[0])
    assert any(not torch.equal(done[0][name], done[2][name]) for name in done[0])


@pytest.mark.parametrize("method", METHODS, ids=["lowrank", "affinequant"])
def test_where_inputs_stay_float_it_does_nothing(method):
    block, calib = case()
    done = [m(block, calib, W4).params for m in (method, replace(method, drop=0.0))]
    assert all(torch.equal(done[0][name], done[1][name]) for name in done[0])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(share):
    for method in (LowRank, AffineQuant):
        with pytest.raises(LowbitError, match="a share from 0 to below 1"):
            method(drop=share)
