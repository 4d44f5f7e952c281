"""Clipping ratios from a scale search: they give the searched scales, and are taken only where the output gains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_contract import everything, same

from lowbit.methods import RTN
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.lowrank import LowRank
from lowbit.methods.options import with_options
from lowbit.methods.searched_clips import SearchedClips, split_by_format, with_searched_clips
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Calib
from lowbit.models.forward import run_all, run_quantized
from lowbit.quant.floating import FLOATS
from lowbit.quant.kquants import K_QUANTS
from lowbit.quant.scale_search import group_errors, search_ratios, search_scales
from lowbit.quant.tables import IQ4_NL, Q2_0
from tiny import block_of, planned, tiny_model

FORMATS = [*FLOATS.values(), *K_QUANTS.values(), IQ4_NL, Q2_0]
COARSE = ["nvfp4a16", "mxfp4", "iq4_nl"]


def weight_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 512, generator=generator) * torch.rand(8, 1, generator=generator)
    weight[2, 64:128] = 0.0
    return weight


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_ratios_lower_the_error_as_the_searched_scales_do(format):
    weight, importance = weight_of(), torch.linspace(0.1, 2, 512)
    peak = weight.abs().max() * 3
    start = format.qparams(weight, tensor_peak=peak)
    ratios = search_ratios(weight, format, importance, peak)
    got = format.qparams(weight, *ratios, peak)
    wanted = search_scales(weight, format, start, importance, peak)
    before, after, least = (group_errors(weight, format, q, importance) for q in (start, got, wanted))
    assert bool((ratios[0] >= 0).all())
    assert float(after.sum()) <= float(before.sum())
    if format not in K_QUANTS.values():  # whose groups share the number of their superblock
        assert bool((after <= before).all())
        assert float((got.scale == wanted.scale).float().mean()) > 0.98
    gain = float((before - least).sum())
    assert float((before - after).sum()) >= 0.5 * gain


def given(scheme, family="llama-odd"):
    block, x = block_of(tiny_model(family), 1)
    block = planned(block, scheme)
    return block, Calib(x, x, run_all(block, x))


def error(block, calib):
    got = run_quantized(RTN()(block, calib), calib.x_q)
    return float(relative_loss(got, calib.y_fp, loss_unit(calib.y_fp, "token")))


@pytest.mark.parametrize("scheme", COARSE)
def test_ratios_are_taken_where_the_layers_output_gains(scheme):
    block, calib = given(scheme)
    done = with_searched_clips(block, calib, torch.arange(4), block.linears())
    assert done.clips
    assert error(done, calib) < error(block, calib)
    assert same({k: v for k, v in everything(done).items() if not k.startswith("clip")}, everything(block))
    # Once more changes nothing: what helps is there already.
    again = with_searched_clips(done, calib, torch.arange(4), block.linears())
    assert error(again, calib) <= error(done, calib)


def test_ratios_that_spoil_the_output_are_left_out():
    block, calib = given("mxfp4")
    rounded = run_quantized(RTN()(block, calib), calib.x_q)
    done = with_searched_clips(block, replace(calib, y_fp=rounded), torch.arange(4), block.linears())
    assert not done.clips


@pytest.mark.parametrize("family", ["llama-odd", "mixtral"])
def test_a_search_sees_nothing_of_the_validation_split(family):
    """Also where experts, which a part of the tokens reaches, take all sequences that a fit trains on."""
    block, calib = given("nvfp4a16", family)
    chosen = torch.arange(len(calib.x_q) - 2)
    other = calib.x_q.clone()
    other[-2:] *= torch.linspace(0.1, 4.0, other.shape[-1])
    searched = [
        with_searched_clips(block, replace(calib, x_q=x), chosen, block.linears()) for x in (calib.x_q, other)
    ]
    assert searched[0].clips
    assert same(*map(everything, searched))


def test_integers_learn_their_ratios_and_other_formats_search_them():
    block, calib = given("w4a8g16")
    assert split_by_format(block) == (block.linears(), [])
    assert split_by_format(given("nvfp4a16")[0]) == ([], block.linears())
    assert with_searched_clips(block, calib, torch.arange(4), []) is block


def test_the_epoch_that_is_kept_keeps_its_own_ratios():
    block, calib = given("nvfp4a16")
    searched = SearchedClips(block.linears(), calib, torch.arange(4))
    generator, found = torch.Generator().manual_seed(0), []
    for epoch in range(3):
        params = {
            name: value * (1 + 0.1 * epoch * torch.randn(value.shape, generator=generator))
            for name, value in block.params.items()
        }
        searched.begin(epoch)  # before its first search there is nothing to use
        searched.search(replace(block, params=params))
        found.append(searched.now)
        searched.begin(epoch + 1)
        assert searched.now is found[-1], "the next epoch trains with what was searched last"
    for epoch in (1, 0, 2):
        searched.begin(epoch)
        assert searched.now is found[epoch]
    assert not torch.equal(found[0]["1.mlp.up_proj"][0], found[2]["1.mlp.up_proj"][0])


@pytest.mark.parametrize("method", [AffineQuant, LowRank])
@pytest.mark.parametrize("scheme", COARSE)
def test_a_learned_step_starts_no_worse_than_without_a_search(method, scheme):
    block, calib = given(scheme)
    plain = {"clip": False} if method is AffineQuant else {"clips": False}
    step = with_options(method(), epochs=0)
    starts = [one(block, calib) for one in (with_options(step, **plain), step)]
    train, _ = step.schedule.split(4)
    part = Calib(*(x[train] for x in (calib.x_fp, calib.x_q, calib.y_fp)))
    without, searched = (error(done, part) for done in starts)
    assert searched < without
    assert starts[1].clips
