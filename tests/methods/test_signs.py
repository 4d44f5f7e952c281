"""Signs: exact where they merge, never worse than none, and only where a zero point can use them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch

from lowbit.methods import signs as module
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.options import with_options
from lowbit.methods.signs import Signs, best_signs, turned_clips, with_signs
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.models.runtime_ops import Matrix
from lowbit.quant.activations import IntTokens
from lowbit.quant.scheme_names import parse_scheme
from mixtures import with_a_cold_expert
from tiny import NAMES, block_of, planned, tiny_model

A4 = IntTokens(4, symmetric=False)


@cache
def case(name, scheme="w4a4"):
    block, x = block_of(tiny_model(name), 1)
    return planned(block, scheme), x


def ranges(low, high, signs):
    """The sum that is made small, without any bookkeeping."""
    top = torch.where(signs < 0, -low, high).amax(1).clamp(min=0)
    bottom = torch.where(signs < 0, -high, low).amin(1).clamp(max=0)
    return float((top - bottom).square().sum())


def drawn(seed, tokens, channels, copies=1):
    """Channels of unequal size and leaning: what signs are for."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, channels, copies, generator=generator)
    values += 3 * torch.randn(channels, 1, generator=generator)
    return (values.amin(2), values.amax(2)) if copies > 1 else (values[..., 0], values[..., 0])


def inputs(block, x, params, linear):
    seen = []
    run_all(block, x, params, taps={linear: lambda value: seen.append(value.flatten(0, -2))})
    return torch.cat(seen)


def noise(x):
    return float(((A4.fake_quant(x) - x).square().mean(1) / x.square().mean(1)).mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_float_function_stays_in_float64(name):
    block, x = case(name)
    block, x = replace(block, params={k: v.double() for k, v in block.params.items()}), x.double()
    params, flipped = with_signs(block, x, 4)
    assert sum(flipped.values()) > 0
    assert any(not torch.equal(params[k], block.params[k]) for k in params)
    # Nothing but signs: no value changes its size, a norm's gain that is stored as a difference apart.
    if not any(edge.offset for edge in block.edges()):
        assert all(torch.equal(params[k].abs(), block.params[k].abs()) for k in params)
    # Norms that store 1 + w compute in float32 inside the library, whatever they are given.
    tolerance = 1e-4 if any(edge.offset for edge in block.edges()) else 1e-10
    wanted = run_all(block, x)
    assert float((run_all(block, x, params) - wanted).abs().max() / wanted.abs().max()) < tolerance


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_signs_are_a_minimum_and_nearly_the_best_of_all(seed, copies):
    low, high = drawn(seed, 40, 8, copies)
    found = best_signs(low, high)
    least = ranges(low, high, found)
    assert set(found.tolist()) <= {1.0, -1.0}
    assert least <= ranges(low, high, torch.ones(8))
    for channel in range(8):
        other = found.clone()
        other[channel] *= -1
        assert least <= ranges(low, high, other) * (1 + 1e-6)
    everything = [ranges(low, high, torch.tensor(signs)) for signs in itertools.product((1.0, -1.0), repeat=8)]
    assert least <= min(everything) * 1.1
    assert least < sorted(everything)[len(everything) // 4]


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_channels_that_are_passed_over_would_not_have_turned(seed, copies, monkeypatch):
    """The search that looks at every channel, outermost or not, finds the very same signs."""
    low, high = drawn(seed, 24, 60, copies)
    looked, reach = [], module._Ends.without
    monkeypatch.setattr(
        module._Ends, "without", lambda self, channel: (looked.append(channel), reach(self, channel))[1]
    )
    found = best_signs(low, high)
    few = len(looked)
    monkeypatch.setattr(module._Ends, "outermost", lambda self: set(range(60)))
    assert torch.equal(best_signs(low, high), found)
    assert few < 0.8 * (len(looked) - few)


def test_the_ends_are_kept_up_to_date():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 50, generator=generator)
    ends = module._Ends(values)
    for channel in torch.randint(0, 12, (60,), generator=generator).tolist():
        rest = torch.cat([values[:channel], values[channel + 1 :]])
        assert torch.equal(ends.without(channel), rest.amax(0).clamp(min=0))
        values[channel] = torch.randn(50, generator=generator)
        ends.update(channel)
        assert torch.equal(ends.value, values.amax(0).clamp(min=0))


def test_what_is_held_does_not_grow_with_the_text(monkeypatch):
    block, x = case("llama")
    looked = []
    monkeypatch.setattr(module, "TOKENS", 8)
    monkeypatch.setattr(module, "best_signs", lambda low, high: looked.append(len(low)) or torch.ones(low.shape[1]))
    with_signs(block, x.repeat(5, 1, 1), 4)
    assert len(looked) == 4
    assert max(looked) <= 10  # 480 tokens were given; each batch of four sequences rounds up by itself


def test_two_opposite_outliers_come_to_one_side():
    block, x = case("llama")
    x = x.clone()
    x[..., 3], x[..., 47] = 12 * x.std(), -12 * x.std()
    before = noise(inputs(block, x, block.params, "1.self_attn.q_proj"))
    params, flipped = with_signs(block, x, 4)
    after = noise(inputs(block, x, params, "1.self_attn.q_proj"))
    assert flipped["1.input_layernorm"] > 0
    assert after < 0.5 * before


@pytest.mark.parametrize("scheme", ["w4a16g16-sym", "w8a8-sym"])
def test_without_a_zero_point_nothing_moves(scheme):
    if (act := parse_scheme(scheme).act) is not None:
        assert not act.independent_ends
    block, x = case("llama", scheme)
    params, flipped = with_signs(block, x, 4)
    assert flipped == {}
    assert all(params[name] is block.params[name] for name in params)


def test_a_relu_keeps_its_signs_and_a_norm_with_a_runtime_op_behind_it_too():
    block, x = case("opt")
    _, flipped = with_signs(block, x, 4)
    assert "1.fc1" not in flipped
    assert "1.self_attn_layer_norm" in flipped
    width = block.params["1.self_attn_layer_norm.weight"].shape[0]
    behind = replace(block, ops={"1.self_attn_layer_norm": Matrix(torch.eye(width))})
    _, flipped = with_signs(behind, x, 4)
    assert "1.self_attn_layer_norm" not in flipped


def test_the_step_records_what_it_turned_over():
    block, x = case("llama")
    done = Signs()(block, Calib(x, -x, run_all(block, x)))
    assert set(done.record[1]["signs"]["turned_over"]) == {
        "1.input_layernorm",
        "1.post_attention_layernorm",
        "1.self_attn.v_proj",
        "1.mlp.up_proj",
    }


def test_clipping_ratios_follow_the_signs_of_their_rows():
    """A negated row has its ends, and their ratios, the other way round; negated columns leave other ends."""
    block, _ = case("llama")
    up, down = "1.mlp.up_proj", "1.mlp.down_proj"
    weight = block.weight(up)
    ratios = {
        name: (torch.full((len(block.weight(name)), 1), 0.7), torch.full((len(block.weight(name)), 1), 0.9))
        for name in (up, down)
    }
    block = replace(block, clips=ratios)
    params = dict(block.params)
    turned = torch.arange(len(weight)) % 3 == 0
    params[f"{up}.weight"] = torch.where(turned[:, None], -weight, weight)
    columns = torch.where(turned, -1.0, 1.0)
    params[f"{down}.weight"] = block.weight(down) * columns
    clips = turned_clips(block, params)
    assert set(clips) == {up}
    done = replace(block, params=params, clips=clips)
    format = block.weight_format(up)
    before = format.fake_quant(weight, format.qparams(weight, *ratios[up]))
    now = format.fake_quant(done.weight(up), format.qparams(done.weight(up), *clips[up]))
    step = format.qparams(weight).scale.max()
    assert float((now * columns[:, None] - before).abs().max()) <= float(step)  # zero points round to either side
    assert torch.equal(clips[up][0][:, 0], torch.where(turned, 0.9, 0.7))
    assert turned_clips(block, dict(block.params))[up][0].flatten().tolist() == ratios[up][0].flatten().tolist()


def test_an_expert_has_as_many_tokens_as_reach_it():
    """Not as many as the sampled ones stand for, of which every batch has one."""
    block, x = block_of(with_a_cold_expert("mixtral"), 1)
    block = replace(planned(block, "w4a4"), least_tokens=10**6)
    _, flipped = with_signs(block, x, 1)
    assert not any("experts" in name for name in flipped)


def test_affinequant_takes_signs_at_its_own_sites_and_not_behind_another_steps_clips():
    block, x = case("llama")
    calib = Calib(x, x, run_all(block, x))

    def flipped(**options):
        done = with_options(AffineQuant(), epochs=0, held_out=0.0, **options)(block, calib)
        sites = done.record[1]["affinequant"]["sites"]
        return {name for name, facts in sites.items() if "turned_over" in facts}

    assert flipped() == {"1.qkv", "1.mlp", "1.heads", "1.channels"}
    assert flipped(channels="off") == {"1.qkv", "1.mlp", "1.heads"}
    assert flipped(signs=False) == set()
    assert flipped(start="given") == set()
