"""RPTQ: k-means by its own conditions, the reorder across each kind of edge, and its gain over one static range."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from cases import outliers, shifted
from method_contract import output_error

from lowbit.errors import LowbitError
from lowbit.methods.channel_clusters import cluster_ranges, reordered
from lowbit.methods.gptq import GPTQ
from lowbit.methods.rptq import RPTQ
from lowbit.methods.rtn import RTN
from lowbit.models.block import Calib
from lowbit.models.equivalence import move
from lowbit.models.forward import run_all
from lowbit.models.reorder import Reorder
from lowbit.models.runtime_ops import Matrix
from lowbit.pipeline.recipe import recipe_from_dict
from lowbit.quant.range_estimators import RangeEstimator
from lowbit.quant.static_activations import StaticInt
from tiny import block_of, planned, tiny_model


def spread_out(block):
    """Channels whose ranges differ by up to a factor of 100, at every edge that takes a diagonal."""
    params, generator = dict(block.params), torch.Generator().manual_seed(2)
    for edge in block.edges():
        if edge.kind in ("norm", "channels", "heads"):
            params = move(block, edge, 10 ** (2 * torch.rand(edge.diagonal_shape, generator=generator) - 1), params)
    return replace(block, params=params)


@cache
def case(family="llama-odd", scheme="w4a8-static32"):
    block, x = block_of(tiny_model(family), 1)
    block = planned(spread_out(block), scheme)
    return block, Calib(x, x, run_all(block, x))


# k-means.


def spread_within(points, labels):
    parts = [points[labels == label] for label in labels.unique()]
    return sum(float((part - part.mean(0)).square().sum()) for part in parts)


def test_clusters_are_a_fixed_point_of_lloyds_algorithm():
    generator = torch.Generator().manual_seed(0)
    low, high = -10 * torch.rand(40, generator=generator), 10 * torch.rand(40, generator=generator)
    labels = cluster_ranges(low, high, 5)
    points = torch.stack([low, high], 1).double()
    centres = torch.stack([points[labels == label].mean(0) for label in range(5)])
    for point, label in zip(points, labels.tolist(), strict=True):
        distances = [float((point - centre).square().sum()) for centre in centres]
        assert distances[label] == min(distances)
    widths = (centres[:, 1] - centres[:, 0]).tolist()
    assert widths == sorted(widths)


def test_the_best_partition_of_a_few_channels_is_found():
    low = torch.tensor([-1.0, -1.2, -50.0, -49.0, 0.0, -0.1])
    high = torch.tensor([1.0, 0.9, 2.0, 2.5, 30.0, 31.0])
    points = torch.stack([low, high], 1).double()
    found = spread_within(points, cluster_ranges(low, high, 3))
    best = min(spread_within(points, torch.tensor(labels)) for labels in product(range(3), repeat=6))
    assert found == pytest.approx(best)


def test_fewer_different_channels_than_clusters():
    labels = cluster_ranges(torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([1.0, 1.0, 2.0]), 8)
    assert labels.tolist() == [0, 0, 1]
    assert cluster_ranges(torch.zeros(4), torch.zeros(4), 3).tolist() == [0] * 4
    idx, sizes = reordered(torch.tensor([2, 0, 1, 0]))
    assert (idx.tolist(), sizes) == ([1, 3, 2, 0], [2, 1, 1])


# The reorder.


def inputs(block, x, linear):
    parts = []
    run_all(block, x, taps={linear: parts.append})
    return torch.cat(parts).flatten(0, -2)


@pytest.mark.parametrize(
    ("family", "norms", "names"),
    [
        ("llama-odd", ("input_layernorm", "post_attention_layernorm"), ("self_attn.o_proj", "mlp.down_proj")),
        ("opt", ("self_attn_layer_norm", "final_layer_norm"), ("self_attn.out_proj", "fc2")),
    ],
)
def test_channels_of_a_cluster_are_neighbours_and_share_their_range(family, norms, names):
    block, calib = case(family)
    done = RPTQ()(block, replace(calib, input_range=RangeEstimator("min-max")))
    assert set(done.ops) == {f"1.{norm}" for norm in norms}
    assert all(isinstance(op, Reorder) for op in done.ops.values())
    for linear in block.linears():
        before, after = inputs(block, calib.x_q, linear), inputs(done, calib.x_q, linear)
        # The same channels in another order.
        order = torch.cdist(after.T.double(), before.T.double()).argmin(1)
        assert sorted(order.tolist()) == list(range(before.shape[1]))
        torch.testing.assert_close(after, before[:, order], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(done.weight(linear), _rows(block, done, linear)[:, order], rtol=0, atol=0)
        scale = done.input_qparams[linear].scale
        runs = torch.unique_consecutive(scale, return_counts=True)[1].tolist()
        assert 2 < len(runs) <= 32
        for own, values, wide in zip(after.split(runs, 1), scale.split(runs), runs, strict=True):
            span = float(own.amax().clamp(min=0) - own.amin().clamp(max=0))
            assert float(values[0]) == pytest.approx(span / 255, rel=1e-4)
            assert wide == own.shape[1]
    for name in names:
        assert not done.record[1]["rptq"][f"1.{name}"]["online"]


def _rows(block, done, linear):
    """A linear's weight with its rows in the order that ``done`` has them, found by their biases or contents."""
    before, after = block.weight(linear), done.weight(linear)
    sums = before.double().square().sum(1), after.double().square().sum(1)
    return before[(sums[1][:, None] - sums[0][None]).abs().argmin(1)]


def test_heads_keep_their_channels():
    """Query heads that share a KV head follow it, each with clusters of its own."""
    block, calib = case("llama-odd")
    edge = next(edge for edge in block.edges() if edge.kind == "heads")
    heads, name = edge.layout, edge.readers[0].module
    assert heads.group > 1
    done = RPTQ()(block, calib)
    before, after = inputs(block, calib.x_q, name), inputs(done, calib.x_q, name)
    order = torch.cdist(after.T.double(), before.T.double()).argmin(1).unflatten(0, (heads.query, heads.dim))
    for head, own in enumerate(order):
        assert sorted(own.tolist()) == list(range(head * heads.dim, (head + 1) * heads.dim))
        assert torch.equal(own % heads.dim, order[head - head % heads.group] % heads.dim)


def test_norms_can_be_left_alone():
    block, calib = case()
    done = RPTQ(sites="folded")(block, calib)
    assert not done.ops
    assert {name for name, own in done.record[1]["rptq"].items()} == {"1.self_attn.o_proj", "1.mlp.down_proj"}
    (note,) = done.notes
    assert note.text.startswith("rptq: ranges of equal parts, in the given order: 1.self_attn.q_proj,")


def test_too_few_clusters_for_the_heads_leave_their_order_with_a_note():
    block, calib = case(scheme="w4a8-static4")
    done = RPTQ()(block, calib)
    assert done.notes[0].text == "rptq: ranges of equal parts, in the given order: 1.self_attn.o_proj"


def test_other_inputs_are_left_alone_with_a_note():
    block, calib = case(scheme="w4a8-static")
    done = RPTQ()(block, calib)
    assert done.params == block.params
    assert "choose a scheme such as w4a8-static32" in done.notes[0].text


# What it is worth.


# With few-bit weights, channels that biases shift far off zero: they widen the range of all and leave weights alone.
GAINS = [
    ("opt", "w4a8", lambda block: shifted(block, by=60.0), 0.6),
    ("llama-odd", "w4a8", spread_out, 0.9),
    *((family, "w8a8", outliers, 0.15) for family in ("llama-odd", "opt", "qwen3")),
]


@pytest.mark.parametrize(("family", "bits", "plant", "share"), GAINS)
def test_it_beats_one_static_range_for_the_tensor(family, bits, plant, share):
    given, x = block_of(tiny_model(family), 1)
    block = planned(plant(given), f"{bits}-static32")
    calib = Calib(x, x, run_all(block, x))
    single = {name: replace(own, input=StaticInt(8, symmetric=False)) for name, own in block.formats.items()}
    one = output_error(replace(block, formats=single), calib, RTN())
    ours = output_error(block, calib, RPTQ(), RTN())
    assert 0 < ours < share * one
    assert ours < output_error(block, calib, RTN())  # equal parts in the given order


def test_gptq_behind_it_lowers_the_error_further():
    block, calib = case("opt")
    done = RPTQ()(block, calib)
    assert output_error(done, calib, GPTQ()) < 0.8 * output_error(done, calib, RTN())


def test_refusals():
    with pytest.raises(LowbitError, match=r"rptq\.sites 'some'"):
        RPTQ(sites="some")
    steps = {"steps": [{"reassemble": {"sites": "norms"}}, "rptq", "rtn"]}
    with pytest.raises(LowbitError, match="rptq cannot come after reassemble"):
        recipe_from_dict(steps, "both")
    block, calib = case()
    norm = block.edges()[0].src.module
    behind = replace(block, ops={norm: Matrix(torch.eye(calib.x_fp.shape[-1]))})
    with pytest.raises(LowbitError, match="a matrix follows the norm"):
        RPTQ()(behind, calib)
