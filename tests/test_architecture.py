"""How methods see a layer's matrices: projections, also several in one linear, and the edges between them."""

from __future__ import annotations

import pytest
import torch

from lowbit.models.edges import Norm, Projection
from tiny import NAMES, block_of, tiny_model

# The rows of each part of a linear that holds q (12 rows), k and v (6 each), one behind the other; the last is
# interleaved.
PARTS = {"q": range(12), "k": range(12, 18), "v": range(18, 24), "w": (3, 4, 9, 10, 1)}


def fused(bias: bool = True) -> dict[str, torch.Tensor]:
    """A linear that holds q (12 rows), k and v (6 each)."""
    generator = torch.Generator().manual_seed(0)
    params = {"0.qkv.weight": torch.randn(24, 5, generator=generator)}
    return params | ({"0.qkv.bias": torch.randn(24, generator=generator)} if bias else {})


def part(name: str) -> Projection:
    return Projection("0.qkv", PARTS[name], whole=False)


@pytest.mark.parametrize("name", PARTS)
def test_a_change_of_a_part_changes_its_rows_alone(name):
    params, projection = fused(), part(name)
    before = dict(params)
    assert projection.out == projection.read(params).shape[0]
    projection.change(params, lambda rows: 2 * rows)
    for key in ("0.qkv.weight", "0.qkv.bias"):
        wanted = before[key].clone()
        wanted[projection.index] *= 2
        assert torch.equal(params[key], wanted)
        assert params[key] is not before[key]  # what was given stays as it is
    assert torch.equal(projection.read(params), 2 * before["0.qkv.weight"][projection.index])
    assert torch.equal(projection.read_bias(params), 2 * before["0.qkv.bias"][projection.index])


def test_weight_and_bias_of_a_part_change_alone():
    params, projection = fused(), part("k")
    before = dict(params)
    projection.change_weight(params, lambda rows: rows * torch.arange(5.0))
    assert params["0.qkv.bias"] is before["0.qkv.bias"]
    assert torch.equal(params["0.qkv.weight"][12:18], before["0.qkv.weight"][12:18] * torch.arange(5.0))
    assert torch.equal(params["0.qkv.weight"][18:], before["0.qkv.weight"][18:])
    projection.change_bias(params, lambda bias: bias + 1)
    wanted = before["0.qkv.bias"].clone()
    wanted[12:18] += 1
    assert torch.equal(params["0.qkv.bias"], wanted)


def test_a_linear_without_a_bias_has_none_to_change():
    params, projection = fused(bias=False), part("v")
    projection.change(params, lambda rows: -rows)
    assert list(params) == ["0.qkv.weight"]
    assert projection.read_bias(params) is None


def test_a_whole_linear_is_replaced_and_all_changes_are_differentiable():
    params = fused()
    Projection("0.qkv", range(24)).change(params, lambda rows: rows.flip(0))
    assert torch.equal(params["0.qkv.weight"], fused()["0.qkv.weight"].flip(0))
    scale = torch.tensor(2.0, requires_grad=True)
    for projection in (part("k"), part("w"), Projection("0.qkv", range(24))):
        params = fused()
        projection.change(params, lambda rows: rows * scale)
        (gradient,) = torch.autograd.grad(sum(value.sum() for value in params.values()), scale)
        rows = projection.index
        wanted = fused()["0.qkv.weight"][rows].sum() + fused()["0.qkv.bias"][rows].sum()
        assert torch.allclose(gradient, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_edges_know_their_parameters(name):
    block, _ = block_of(tiny_model(name))
    assert {edge.kind for edge in block.edges()} == {"norm", "heads", "channels", "qk"}
    linears = set(block.linears())
    for edge in block.edges():
        for end in (edge.src, *edge.dst):
            assert end.parameter in block.params
            if isinstance(end, Projection):
                assert end.module in linears
                matrix = end.read(block.params)
                assert matrix.shape == (end.out, block.weight(end.module).shape[1])
                assert end.whole == (end.out == block.weight(end.module).shape[0])
                assert (end.read_bias(block.params) is None) == (end.bias not in block.params)
            else:
                assert isinstance(end, Norm)
                assert block.params[end.parameter].ndim == 1
        if edge.kind == "norm":
            assert edge.readers == edge.dst
            assert edge.width == len(block.params[edge.src.parameter])
            assert all(dst.read(block.params).shape[1] == edge.width for dst in edge.readers)
        elif edge.kind != "qk":
            (reader,) = edge.readers
            share = edge.layout.group if edge.kind == "heads" else 1
            assert reader.read(block.params).shape[1] == share * edge.width


@pytest.mark.parametrize(
    ("name", "partner"),
    [("llama", ("0.mlp.gate_proj", True)), ("phi3", ("0.mlp.gate_up_proj", False)), ("opt", None)],
)
def test_the_partner_of_a_channels_edge_is_what_its_source_is_multiplied_with(name, partner):
    block, _ = block_of(tiny_model(name))
    for edge in block.edges():
        if edge.kind != "channels" or partner is None:
            assert edge.partner is None
            continue
        assert edge.partner is not None
        assert (edge.partner.module, edge.partner.whole) == partner
        assert edge.partner.out == edge.width
        assert edge.partner != edge.src


def test_columns_of_a_reader_change_alone():
    params = fused()
    some = Projection("0.qkv", range(24), columns=(4, 1))
    assert torch.equal(some.read(params), params["0.qkv.weight"][:, [4, 1]])
    assert torch.equal(some.inputs(torch.arange(5.0)), torch.tensor([4.0, 1.0]))
    assert some.outer(torch.tensor([7.0, 8.0]), 5).tolist() == [1.0, 8.0, 1.0, 1.0, 7.0]
    some.change_weight(params, lambda weight: weight * torch.tensor([2.0, 3.0]))
    assert torch.equal(params["0.qkv.weight"], fused()["0.qkv.weight"] * torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0]))
    both = Projection("0.qkv", (20, 3), whole=False, columns=range(1, 3))
    both.change_weight(params, lambda weight: weight + 1)
    wanted = fused()["0.qkv.weight"] * torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0])
    wanted[[[20], [3]], [[1, 2]]] += 1
    assert torch.equal(params["0.qkv.weight"], wanted)
