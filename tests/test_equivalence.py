"""Maps move along edges without changing the function (invariant 2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.models.equivalence import can_move, move
from lowbit.models.forward import run
from lowbit.models.runtime_ops import Clip, Gather, Matrix
from tiny import NAMES, block_of, tiny_model


def random_maps(edge, generator):
    """Every shape of map that the edge takes, random and well conditioned, in float64."""

    def positive(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5

    def matrix(*shape):
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.eye(shape[-1], dtype=torch.float64) + 0.3 * noise / shape[-1] ** 0.5

    if edge.limit != "rotation":
        yield positive(*edge.diagonal_shape)
    if edge.kind != "qk" and edge.scales and not edge.positive:
        yield -positive(*edge.diagonal_shape)
    if edge.kind == "heads" or edge.free:
        whole = matrix(*edge.diagonal_shape, edge.size)
        if edge.limit == "matrix":
            yield whole
        elif edge.limit == "rotation":
            yield torch.linalg.qr(whole)[0]
    elif edge.pairs and edge.limit in ("matrix", "rotation"):
        rotation = torch.randn(*edge.diagonal_shape, 2, generator=generator, dtype=torch.float64) + 1.5
        yield rotation if edge.limit == "matrix" else rotation / rotation.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_random_map_across_every_edge_leaves_the_output(name, dtype):
    block, x = block_of(tiny_model(name), start=1, dtype=dtype)
    wanted = run(block, x)
    generator = torch.Generator().manual_seed(7)
    # float64 shows that the algebra is exact. Norms that store 1 + w compute their gain in float32 inside the
    # library, whatever dtype they are given, so there float32's tolerance is the best that can be asked for.
    in_float32 = dtype == torch.float32 or any(edge.offset for edge in block.edges())
    tolerance = 1e-4 if in_float32 else 1e-10
    assert len(block.edges()) == (6 if name == "phi3-partial" else 5)
    for edge in block.edges():
        for map in random_maps(edge, generator):
            moved = move(block, edge, map.to(dtype))
            changed = [key for key in moved if not torch.equal(moved[key], block.params[key])]
            assert len(changed) >= 1 + len(edge.dst) - (edge.src in edge.dst) - (name.startswith("phi3"))
            error = (run(block, x, moved) - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance, (edge, tuple(map.shape), float(error))


def test_all_edges_at_once_and_differentiable():
    block, x = block_of(tiny_model("llama"), dtype=torch.float64)
    wanted = run(block, x)
    maps, params = [], dict(block.params)
    generator = torch.Generator().manual_seed(3)
    for edge in block.edges():
        map = list(random_maps(edge, generator))[-1].requires_grad_()
        maps.append(map)
        params = move(block, edge, map, params)
    assert torch.allclose(run(block, x, params), wanted, atol=1e-10)
    params["0.self_attn.q_proj.weight"].square().sum().backward()
    assert maps[0].grad is not None
    assert maps[0].grad.abs().sum() > 0


def test_a_map_of_the_wrong_shape_is_refused():
    block, _ = block_of(tiny_model("llama"))
    norm = block.edges()[0]
    with pytest.raises(LowbitError, match="dense matrix after a norm"):
        move(block, norm, torch.eye(64))


@pytest.mark.parametrize(
    "op", [Matrix(torch.eye(64)), Gather(torch.arange(64), torch.ones(64))], ids=["matrix", "gather"]
)
def test_no_map_moves_over_a_norm_with_an_op_behind_it(op):
    block, _ = block_of(tiny_model("llama"))
    norm, other = (edge for edge in block.edges() if edge.kind == "norm")
    held = replace(block, ops={norm.src.module: op})
    assert not can_move(held, norm)
    message = f"a {op.kind} follows the norm 0.input_layernorm: no transform can be folded across it; put the step"
    with pytest.raises(LowbitError, match=message):
        move(held, norm, torch.full((64,), 2.0))
    assert all(can_move(held, edge) for edge in held.edges() if edge != norm)
    assert can_move(block, norm)
    move(held, other, torch.full((64,), 2.0))
    # Before a linear nothing is in a map's way.
    clipped = replace(block, ops={"0.self_attn.q_proj": Clip(torch.tensor([0.9, 0.9]))})
    assert all(can_move(clipped, edge) for edge in clipped.edges())
