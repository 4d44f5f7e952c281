"""AWQ: its errors against explicit tokens, its choices against brute force."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.methods.awq import AWQ, scaled_error
from lowbit.methods.options import with_options
from lowbit.methods.rtn import RTN
from lowbit.methods.statistics import Statistics
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.quant.floating import NVFP4
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme_names import parse_scheme, with_overrides
from tiny import block_of, planned, tiny_model

SCHEME = parse_scheme("w3a16g16-asym")


@cache
def case(name, scheme=SCHEME):
    block, x = block_of(tiny_model(name), 1)
    block = planned(block, scheme)
    return block, Calib(x, -3 * x, run_all(block, x))  # AWQ looks at the float stream


def tokens(columns=16, count=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    x[:, 3] *= 20
    return x, torch.randn(6, columns, generator=generator, dtype=torch.float64)


def inputs(block, x, linear):
    seen = []
    run_all(block, x, taps={linear: seen.append})
    return torch.cat([part.flatten(0, -2) for part in seen]).double()


@pytest.mark.parametrize("format", [IntFormat(3), IntFormat(4, 4, symmetric=False)])
def test_the_scaled_error_is_equation_4_on_the_tokens(format):
    x, weight = tokens()
    for scale in (torch.ones(16, dtype=torch.float64), x.abs().mean(0) ** 0.5):
        scaled = weight * scale
        quantized = format.fake_quant(scaled, format.qparams(scaled))
        literal = sum(float((quantized @ (row / scale) - weight @ row).square().sum()) for row in x)
        assert literal > 0
        # float64 and sums of 50 x 6 squares
        assert scaled_error(weight, scale, x.T @ x, format) == pytest.approx(literal, rel=1e-10)


@pytest.mark.parametrize("format", [IntFormat(3), IntFormat(3, 4, symmetric=False), IntFormat(2, 8)])
def test_the_best_clip_is_that_of_brute_force(format):
    x, weight = tokens(seed=1)
    size = format.group or 16
    got = AWQ()._best_clip(weight, x.T @ x, format)
    assert got.shape == (6, 16 // size)
    for row in range(6):
        for group in range(16 // size):
            part = slice(group * size, (group + 1) * size)
            own, alone = weight[row : row + 1, part], replace(format, group=None)
            errors = {}
            for step in range(11):  # 1.0, 0.95 .. 0.5
                factor = 1 - step / 20
                delta = alone.fake_quant(own, alone.qparams(own, factor, factor)) - own
                errors[factor] = float((x[:, part] @ delta.T).square().sum())
            assert float(got[row, group]) == min(errors, key=errors.__getitem__)
    assert len(got.unique()) > 1


def test_the_range_of_clips():
    x, weight = tokens(seed=2)
    format = IntFormat(2)
    assert torch.equal(AWQ(clip_least=1.0)._best_clip(weight, x.T @ x, format), torch.ones(6, 1, dtype=torch.float64))
    few = AWQ(clip_least=0.5, clip_grid=2)._best_clip(weight, x.T @ x, format)
    assert set(few.flatten().tolist()) <= {1.0, 0.5}
    zeros = torch.zeros_like(weight)
    assert torch.equal(AWQ()._best_clip(zeros, x.T @ x, format), torch.ones(6, 1, dtype=torch.float64))


@pytest.mark.parametrize("name", ["llama-odd", "gemma3", "phi3", "opt"])
def test_no_chosen_scale_is_worse_than_no_scale(name):
    block, calib = case(name)
    better = 0
    for edge in block.edges():
        if edge.kind == "qk":
            continue
        readers = [dst.module for dst in edge.readers]
        x = inputs(block, calib.x_fp, readers[0]).float()
        seen = Statistics(("gram", "magnitude"))
        seen.add(x)
        map = AWQ()._best_scale(block, block.params, edge, seen)
        assert bool((map > 0).all())
        spread = edge.spread(map.flatten())
        errors = []
        for scale in (spread, torch.ones_like(spread)):
            errors.append(sum(scaled_error(block.weight(r), scale, seen["gram"], SCHEME.weight) for r in readers))
        assert errors[0] <= errors[1]
        better += errors[0] < 0.97 * errors[1]
    assert better >= 2, "the search finds nothing on models with outlier channels"


@pytest.mark.parametrize("kind", ["norm", "heads", "channels"])
def test_the_scale_is_the_best_of_the_papers_candidates(kind):
    block, calib = case("llama-odd")
    edge = next(edge for edge in block.edges() if edge.kind == kind)
    x = inputs(block, calib.x_fp, edge.readers[0].module)
    mean, best = x.abs().mean(0), (float("inf"), torch.ones(1))
    if kind == "heads":  # 4 query heads of 24, two for each KV head: both see the mean of the two
        first, second, third, fourth = mean.split(24)
        mean = torch.cat([(first + second) / 2] * 2 + [(third + fourth) / 2] * 2)
    for ratio in range(10):
        scale = mean ** (ratio / 10)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for dst in edge.readers:
            weight = dst.read(block.params).double()
            quantized = SCHEME.weight.fake_quant_clipped(weight * scale)
            error += float((x @ (quantized / scale - weight).T).square().sum())
        best = min(best, (error, scale), key=lambda pair: pair[0])
    result = AWQ(grid=10, clip=False)(block, calib)
    if kind == "norm":
        assert best[1].max() > 1.5
    found = edge.readers[0].read(result.params) / edge.readers[0].read(block.params)
    # The step's sums are float32, so a scale differs in its last digits; candidates are several per cent apart.
    torch.testing.assert_close(found.double(), best[1].expand_as(found).double(), rtol=1e-4, atol=0)


def test_query_heads_that_share_a_kv_head_share_its_scales():
    block, calib = case("llama-odd")
    assert {edge.layout.group for edge in block.edges() if edge.kind == "heads"} == {2}
    result = AWQ(clip=False)(block, calib)
    ratio = (result.weight("1.self_attn.o_proj") / block.weight("1.self_attn.o_proj")).unflatten(1, (2, 2, 24))
    torch.testing.assert_close(ratio, ratio[:1, :, :1].expand_as(ratio), rtol=1e-5, atol=0)
    assert ratio.std() > 0.01
    back = result.weight("1.self_attn.v_proj") * ratio[0, :, 0].reshape(-1, 1)
    # v also has the norm's scale on its columns; take that out with k, which has nothing else.
    norm = result.weight("1.self_attn.k_proj") / block.weight("1.self_attn.k_proj")
    torch.testing.assert_close(back / norm[:1], block.weight("1.self_attn.v_proj"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "left"), [("llama-odd", {"q_proj", "k_proj"}), ("phi3", {"qkv_proj"}), ("opt", {"q_proj", "k_proj"})]
)
def test_queries_and_keys_are_not_clipped_and_all_others_are(name, left):
    block, calib = case(name)
    result = AWQ()(block, calib)
    assert {linear.rpartition(".")[2] for linear in block.linears() if linear not in result.clips} == left
    for linear, (low, high) in result.clips.items():
        assert torch.equal(low, high)
        assert low.shape == (block.weight(linear).shape[0], SCHEME.weight.groups(block.weight(linear).shape[1]))
        assert 0.5 <= low.min() < low.max() <= 1
    assert AWQ(clip=False)(block, calib).clips == {}


def test_clips_are_measured_on_the_moved_block_and_reach_the_qparams():
    block, calib = case("llama-odd")
    result = AWQ()(block, calib)
    done = RTN()(result, calib)
    name = "1.mlp.down_proj"
    x = inputs(result, calib.x_fp, name)
    again = AWQ()._best_clip(result.weight(name), (x.T @ x).float(), SCHEME.weight)
    # Moments summed in another order flip a choice only between two factors of all but equal error.
    assert (again == result.clips[name][0]).double().mean() > 0.99
    low, high = result.clips[name]
    wanted = SCHEME.weight.qparams(result.weight(name), low, high)
    assert torch.equal(done.qweights[name].qparams.scale, wanted.scale)
    assert not torch.equal(wanted.scale, SCHEME.weight.qparams(result.weight(name)).scale)
    assert torch.equal(result.qparams(name).zero, wanted.zero)


def test_where_nothing_is_quantized_nothing_moves():
    block, calib = case("llama-odd", with_overrides(SCHEME, {"*.down_proj": "float", "*.o_proj": "float"}))
    result = AWQ()(block, calib)
    assert "1.mlp.down_proj" not in result.clips
    for linear in ("1.mlp.down_proj", "1.self_attn.o_proj"):
        assert torch.equal(result.weight(linear), block.weight(linear))
    assert not torch.equal(result.weight("1.mlp.gate_proj"), block.weight("1.mlp.gate_proj"))
    edge = next(edge for edge in block.edges() if edge.kind == "channels")
    assert edge.width == 96


@pytest.mark.parametrize("options", [{"grid": 0}, {"clip_grid": 0}, {"clip_least": 0.0}, {"clip_least": 1.5}])
def test_options_out_of_range(options):
    ((name, value),) = options.items()
    with pytest.raises(LowbitError, match=rf"awq\.{name} {value:g} given; it must be"):
        AWQ(**options)


def test_formats_other_than_integers_try_wider_ranges_too():
    """5.1 and 2.55 are near the elements 4 and 2 on a scale of 1.25, to which 1.4 * 5.1 / 6 = 1.19 is rounded."""
    awq = AWQ(clip_grid=10)
    assert awq._clip_ratios(IntFormat(4, 16)) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert awq._clip_ratios(NVFP4) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 1.1, 1.2, 1.3, 1.4, 1.5])
    weight, gram, peak = torch.tensor([[5.1] + [2.55] * 15]), torch.eye(16), torch.tensor(20.0)
    ratio = awq._best_clip(weight, gram, NVFP4, peak)
    assert ratio.item() == pytest.approx(1.4)
    assert NVFP4.qparams(weight, ratio, ratio, peak).scale.item() == 1.25
    assert with_options(awq, clip_most=1.0)._best_clip(weight, gram, NVFP4, peak).item() <= 1.0
