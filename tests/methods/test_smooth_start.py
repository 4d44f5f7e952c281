"""The smooth start: its scales by hand, and what one massive token does to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.methods import RTN
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.options import with_options
from lowbit.models.block import Calib
from lowbit.models.forward import run, run_all, run_quantized
from tiny import block_of, planned, tiny_model

RANKS = {"llama-odd": ("input_layernorm", "self_attn.q_proj"), "opt": ("self_attn_layer_norm", "self_attn.q_proj")}


def started(block, calib, **options):
    """The block with the start folded in."""
    step = with_options(AffineQuant(), signs=False, epochs=0, **options)
    fit = AffineFit(step.sites, step.maps, step.clipping, step.objective, step.schedule, block, calib)
    return replace(block, params=fit.base)


def inputs(block, x, linear):
    seen = []
    run(block, x, taps={linear: seen.append})
    return seen[0].flatten(0, -2).double()


@pytest.mark.parametrize("peaks", ["relative", "absolute"])
@pytest.mark.parametrize("power", [0.5, 0.75])
@pytest.mark.parametrize("name", ["llama-odd", "opt"])
def test_the_scale_is_that_of_its_equation(name, power, peaks):
    """At the norm before q, k and v, with a shift where there are biases."""
    block, x = block_of(tiny_model(name), 1)
    block = planned(block, "w4a4")
    done = started(block, Calib(x, x, run_all(block, x)), init_power=power, init_peaks=peaks, heads="off")
    rows = inputs(block, x, "1.self_attn.q_proj")
    shift = (rows.amax(0) + rows.amin(0)) / 2 if name == "opt" else torch.zeros(rows.shape[1]).double()
    rows = rows - shift
    peak = rows.abs().amax(0)
    if peaks == "relative":
        peak = (rows / rows.square().mean(1, keepdim=True).sqrt()).abs().pow(8).mean(0).pow(1 / 8)
    weight = torch.stack([block.weight(f"1.self_attn.{n}_proj").abs().amax(0).double() for n in "qkv"]).amax(0)
    scale = peak.pow(power) / weight.pow(1 - power)
    # Read off the inputs of the block that it is folded into.
    found = inputs(done, x, "1.self_attn.q_proj") * scale
    assert torch.allclose(found, rows, rtol=1e-3, atol=1e-3 * float(rows.abs().max()))


def with_massive_token():
    """A layer whose channel 5 before down_proj is huge in one token of 96 and ordinary in all others."""
    block, x = block_of(tiny_model("llama"), 1)
    params = {name: value.clone() for name, value in block.params.items()}
    for name in ("gate", "up"):
        params[f"1.mlp.{name}_proj.weight"][:, 11] = 0
        params[f"1.mlp.{name}_proj.weight"][5, 11] = 5.0
    params["1.self_attn.o_proj.weight"][11] = 0
    x = x.clone()
    x[..., 11] = 0
    x[0, 0] *= 1e-3
    x[0, 0, 11] = 300.0
    block = planned(replace(block, params=params), "w4a4")
    return block, Calib(x, x, run_all(block, x))


def test_one_massive_token_does_not_decide_the_scale_of_its_channel():
    block, calib = with_massive_token()
    rows = inputs(block, calib.x_fp, "1.mlp.down_proj")
    assert float(rows[0, 5]) > 100 * float(rows[1:].abs().max())  # one token
    errors = {}
    for peaks in ("relative", "absolute"):
        done = started(block, calib, init_peaks=peaks)
        wanted = calib.y_fp.flatten(0, 1)[1:]
        got = run_quantized(RTN()(done, calib), calib.x_q).flatten(0, 1)[1:]
        errors[peaks] = float(((got - wanted).square().mean(-1) / wanted.square().mean(-1)).mean())
    assert errors["relative"] < 0.7 * errors["absolute"], errors
