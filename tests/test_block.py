"""Blocks run the library's layers exactly; maps move without changing the function (invariant 2)."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.models.block import run, run_all
from lowbit.models.equivalence import map_width, move
from lowbit.quant.scheme import parse_scheme
from tiny import NAMES, block_of, params_of, skeleton_of, tiny_ids, tiny_model


@pytest.mark.parametrize("name", NAMES)
def test_walking_the_blocks_equals_the_model_bit_for_bit(name):
    model, ids = tiny_model(name), tiny_ids()
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    skeleton = skeleton_of(model)
    assert all(p.is_meta for layer in skeleton.layers for p in layer.parameters())
    x = skeleton.start(ids)
    for i in range(len(skeleton.layers)):
        x = run_all(skeleton.block(i, params_of(model, skeleton, i)), x, batch=4)
    assert torch.equal(skeleton.logits(ids, x), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_model_passes_to_its_layers_fits_any_number_of_sequences(name):
    block, x = block_of(tiny_model(name))
    wanted = run(block, x)
    for batch in (1, 3):
        assert torch.allclose(run_all(block, x, batch=batch), wanted, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_window_of_blocks_equals_its_blocks_in_turn(name):
    model = tiny_model(name)
    skeleton = skeleton_of(model)
    x = skeleton.start(tiny_ids())
    both = run(skeleton.block(1, params_of(model, skeleton, 1, 2), 2), x)
    one = run(skeleton.block(1, params_of(model, skeleton, 1)), x)
    assert torch.equal(both, run(skeleton.block(2, params_of(model, skeleton, 2)), one))


def random_maps(block, edge, generator):
    """Every shape of map that the edge takes, random and well conditioned, in float64."""

    def positive(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5

    def matrix(*shape):
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.eye(shape[-1], dtype=torch.float64) + 0.3 * noise / shape[-1] ** 0.5

    heads, pairs = block.heads, block.heads.rotary // 2
    if edge.kind in ("norm", "channels"):
        yield positive(map_width(block, edge))
        if not edge.positive:
            yield -positive(map_width(block, edge))
    elif edge.kind == "heads" or pairs == 0:
        yield positive(heads.kv, heads.dim)
        yield matrix(heads.kv, heads.dim, heads.dim)
    elif block.family.qk_norm_per_head:
        yield positive(pairs)
    else:
        yield positive(heads.kv, pairs)
        yield torch.randn(heads.kv, pairs, 2, generator=generator, dtype=torch.float64) + 1.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_random_map_across_every_edge_leaves_the_output(name, dtype):
    block, x = block_of(tiny_model(name), start=1, dtype=dtype)
    wanted = run(block, x)
    generator = torch.Generator().manual_seed(7)
    # float64 shows that the algebra is exact. Norms that store 1 + w compute their gain in float32 inside the
    # library, whatever dtype they are given, so there float32's tolerance is the best that can be asked for.
    in_float32 = dtype == torch.float32 or block.family.norm_offset
    tolerance = 1e-4 if in_float32 else 1e-10
    assert len(block.edges()) == 5
    for edge in block.edges():
        for map in random_maps(block, edge, generator):
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
        map = list(random_maps(block, edge, generator))[-1].requires_grad_()
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


def test_taps_see_inputs_and_nothing_is_left_behind():
    block, x = block_of(tiny_model("llama"))
    seen = []
    run(block, x, taps={"0.mlp.down_proj": seen.append})
    assert seen[0].shape == (4, 24, 96)
    assert all(not m._forward_pre_hooks for layer in block.layers for m in layer.modules())
    assert block.layers[0].self_attn.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", NAMES)
def test_activation_and_kv_formats_change_the_output_a_little(name):
    block, x = block_of(tiny_model(name))
    exact = run(block, x)
    errors = []
    for scheme in ("w8a8", "w8a4", "w8a16kv8", "w8a16kv4"):
        got = run(block, x, scheme=parse_scheme(scheme))
        errors.append(float((got - exact).square().mean() / exact.square().mean()))
    assert 0 < errors[0] < 0.01 < 100 * errors[1]
    assert 0 < errors[2] < errors[3] < 0.2
    assert errors[0] < errors[1]


def test_linears_of_a_group_read_one_tensor():
    for name in NAMES:
        block, x = block_of(tiny_model(name))
        seen: dict[str, torch.Tensor] = {}
        order: list[str] = []

        def keep(key, value, order=order, seen=seen):
            order.append(key)
            seen[key] = value

        run(block, x, taps={key: partial(keep, key) for key in block.linears()})
        assert sorted(order) == sorted(block.linears())
        for group in block.linear_groups():
            assert all(torch.equal(seen[key], seen[group[0]]) for key in group)
        firsts = [order.index(group[0]) for group in block.linear_groups()]
        assert firsts == sorted(firsts)
        weights = {f"{key}.weight" for key in block.linears()}
        others = {k for k, v in block.params.items() if v.ndim == 2} - weights
        assert not others, f"{name}: linears that the family does not list: {others}"
