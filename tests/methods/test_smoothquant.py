"""SmoothQuant: equation 4, moved over the norms and over nothing else."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.methods.smoothquant import SmoothQuant, smooth_scale
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from tiny import block_of, planned, tiny_model


@cache
def case(name):
    block, x = block_of(tiny_model(name), 1)
    block = planned(block, "w8a8")
    # The quantized stream is something else altogether: the scales are about the float one.
    return block, Calib(x, -3 * x, run_all(block, x))


def inputs(block, x, linear):
    seen = []
    run_all(block, x, taps={linear: seen.append})
    return torch.cat([part.flatten(0, -2) for part in seen])


def test_the_formula():
    activations, weights = torch.tensor([16.0, 4.0, 1.0]), torch.tensor([1.0, 2.0, 4.0])
    assert smooth_scale(activations, weights, 0.5).tolist() == pytest.approx([4.0, 2**0.5, 0.5])
    assert smooth_scale(activations, weights, 0.75).tolist() == pytest.approx([8.0, 4**0.75 / 2**0.25, 4**-0.25])
    assert smooth_scale(activations, weights, 1.0).tolist() == [16.0, 4.0, 1.0]
    assert smooth_scale(activations, weights, 0.0).tolist() == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_get_a_finite_scale_that_is_not_zero(alpha):
    scale = smooth_scale(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0]), alpha)
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())


@pytest.mark.parametrize(("name", "offset"), [("llama-odd", 0.0), ("gemma3", 1.0), ("phi3", 0.0), ("opt", 0.0)])
def test_the_step_does_what_the_formula_says_and_touches_nothing_else(name, offset):
    block, calib = case(name)
    alpha = 0.6
    result = SmoothQuant(alpha)(block, calib)
    norms = {
        "llama-odd": ("input_layernorm", "post_attention_layernorm"),
        "gemma3": ("input_layernorm", "pre_feedforward_layernorm"),
        "phi3": ("input_layernorm", "post_attention_layernorm"),
        "opt": ("self_attn_layer_norm", "final_layer_norm"),
    }[name]
    groups = block.linear_groups()
    wanted = dict(block.params)
    for norm, readers in zip(norms, (groups[0], groups[2]), strict=True):
        peak = inputs(block, calib.x_fp, readers[0]).abs().amax(0)
        heaviest = torch.stack([block.weight(linear).abs().amax(0) for linear in readers]).amax(0)
        scale = peak**alpha / heaviest ** (1 - alpha)
        for kind in ("weight", "bias"):
            key, plus = f"1.{norm}.{kind}", offset if kind == "weight" else 0.0
            if key in wanted:
                wanted[key] = (wanted[key] + plus) / scale - plus
        for linear in readers:
            wanted[f"{linear}.weight"] = block.weight(linear) * scale
    assert set(result.params) == set(wanted)
    for key, value in wanted.items():
        # float32: a few roundings each; the gain minus its offset is compared on the scale of the gain
        torch.testing.assert_close(result.params[key], value, rtol=1e-5, atol=1e-6, msg=key)
    moved = {key for key, value in result.params.items() if not torch.equal(value, block.params[key])}
    untouched = {f"{linear}.weight" for linear in (*groups[1], *groups[3])}
    assert not moved & untouched
    assert not result.clips


def test_alpha_1_takes_all_outliers_from_the_activations_and_alpha_0_from_the_weights():
    block, calib = case("llama-odd")
    group = block.linear_groups()[0]
    before = inputs(block, calib.x_fp, group[0]).abs().amax(0)
    assert before.max() > 3 * before.median()
    flat = SmoothQuant(1.0)(block, calib)
    torch.testing.assert_close(inputs(flat, calib.x_fp, group[0]).abs().amax(0), torch.ones(64), rtol=1e-5, atol=0)
    even = SmoothQuant(0.0)(block, calib)
    peaks = torch.stack([even.weight(linear).abs().amax(0) for linear in group]).amax(0)
    torch.testing.assert_close(peaks, torch.ones(64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(LowbitError, match=r"smoothquant\.alpha .* given; it must be from 0 to 1"):
        SmoothQuant(alpha)
