"""Experts of a mixture are linears of their own: the walk equals the model, statistics see what reaches an expert."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import mixtures
from lowbit.checkpoints.safetensors_folder import block_params
from lowbit.models.arguments import for_batch
from lowbit.models.equivalence import move
from lowbit.models.experts import experts_of, gated_experts, put_together, taken_apart
from lowbit.models.forward import routing_of, run, run_all
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import check_model, open_weights
from mixtures import tiny_mixture
from test_equivalence import random_maps
from tiny import block_of, params_of, planned, skeleton_of, tiny_ids


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The mixtures by hand are known."""
    mixtures.declare(monkeypatch)


@pytest.mark.parametrize("name", mixtures.NAMES)
def test_the_walk_is_the_model_bit_for_bit(name):
    model = tiny_mixture(name)
    skeleton, ids = skeleton_of(model), tiny_ids()
    x = skeleton.embed(ids)
    for index in range(len(skeleton.layers)):
        x = run_all(skeleton.block(index, params_of(model, skeleton, index)), x)
    with torch.no_grad():
        assert torch.equal(skeleton.logits(ids, x), model(ids, use_cache=False).logits)
    assert model.config._experts_implementation == "eager", "left behind"


@pytest.mark.parametrize("name", mixtures.NAMES)
def test_the_declared_layout_is_what_the_library_says(name):
    model = tiny_mixture(name)
    kind = skeleton_of(model).architecture.layers[2]
    module = model.model.layers[2].get_submodule(kind.experts.module)
    assert experts_of(kind.experts.module, module, model.config.model_type) == kind.experts
    listed = {name for group in kind.groups for name in group}
    linears = {n for n, m in model.model.layers[2].named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears <= listed
    assert listed - linears - kind.routers == {n for group in kind.experts.groups for n in group}


@pytest.mark.parametrize("name", mixtures.NAMES)
def test_an_experts_matrices_put_together_are_the_librarys(name):
    model = tiny_mixture(name)
    kind = skeleton_of(model).architecture.layers[0]
    stored = dict(model.model.layers[0].named_parameters())
    apart = taken_apart(kind, stored, "")
    assert not any(value.ndim == 3 for value in apart.values())
    again = put_together(kind.experts, apart)
    assert again
    for parameter, value in again.items():
        assert torch.equal(value, stored[f"{kind.experts.module}.{parameter}"])


def test_the_name_of_an_experts_linear():
    experts = gated_experts("mlp.experts", count=12, width=3, hidden=5)
    assert [experts.place(f"mlp.experts.{number}.up_proj")[0] for number in (0, 7, 11)] == [0, 7, 11]
    assert experts.place("mlp.experts.7.up_proj")[1] is experts.reads[1]
    others = ("mlp.up_proj", "mlp.experts.up_proj", "mlp.experts.x.up_proj", "mlp.experts.3.w1", "mlp.experts")
    assert [experts.place(name) for name in others] == [None] * 5


@pytest.mark.parametrize("name", mixtures.NAMES)
@pytest.mark.parametrize("stored", ["apart", "together"])
def test_a_checkpoint_is_read_however_its_experts_are_stored(name, stored, tmp_path):
    model = tiny_mixture(name)
    model.save_pretrained(tmp_path)
    if stored == "together":
        save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    elif name != "gpt-oss":
        names = load_file(tmp_path / "model.safetensors")
        assert any(".experts.3.w2." in n or ".experts.3.down_proj." in n for n in names)
        assert any("block_sparse_moe" in n for n in names) == (name == "mixtral")
    checkpoint, _ = open_weights(tmp_path, model.config)
    skeleton = Skeleton(model.config)
    assert check_model(checkpoint, model.config) == ()
    got = block_params(checkpoint, skeleton.architecture.blocks, 2, skeleton.parameter_shapes(2))
    wanted = skeleton.block(2, params_of(model, skeleton, 2)).params
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("name", mixtures.NAMES)
def test_a_random_map_across_every_edge_leaves_the_output(name):
    block, x = block_of(tiny_mixture(name), start=2, dtype=torch.float64)
    wanted, generator = run(block, x), torch.Generator().manual_seed(0)
    kinds = [edge.kind for edge in block.edges()]
    experts = 0 if name == "gpt-oss" else 4
    assert kinds.count("channels") == experts + (name == "qwen2-moe")
    assert len(block.edges()[kinds.index("norm", 1)].dst) == 1 + 2 * 4 + 3 * (name == "qwen2-moe")
    for edge in block.edges():
        # Routers compute their softmax in float32, whatever they are given.
        close = 1e-5 if edge.kind == "norm" else 1e-6 if edge.kind != "channels" else 1e-10
        for map in random_maps(edge, generator):
            moved = move(block, edge, map)
            ends = {edge.src.module, *(dst.module for dst in edge.dst)}
            assert {n.rpartition(".")[0] for n in moved if not torch.equal(moved[n], block.params[n])} == ends
            assert float((run(block, x, moved) - wanted).abs().max() / wanted.abs().max()) < close, edge
            half = {**moved, edge.src.parameter: block.params[edge.src.parameter]}
            assert float((run(block, x, half) - wanted).abs().max() / wanted.abs().max()) > 1e-4, edge


@pytest.mark.parametrize("name", mixtures.NAMES)
def test_taps_see_the_tokens_that_reach_an_expert_or_all(name):
    from dataclasses import replace

    block, x = block_of(tiny_mixture(name), start=2)
    experts = block.kinds[0].experts
    up, down = (f"2.{experts.name(1, linear)}" for linear in (experts.reads[1], experts.writes))
    module = f"2.{experts.module}"
    seen = {}
    taps = {n: lambda value, n=n: seen.__setitem__(n, value) for n in (up, down, module, routing_of(module))}
    wanted = run(block, x, taps=taps)
    chosen = (seen[routing_of(module)] == 1).any(1)
    assert 0 < int(chosen.sum()) < len(chosen) == x.shape[0] * x.shape[1]
    own = seen[up], seen[down]
    # The library's order is by rank first: the tokens are the same.
    assert torch.equal(own[0].sort(0).values, seen[module][chosen].sort(0).values)
    assert torch.equal(run(replace(block, every_token=True), x, taps=taps), wanted), "outputs use the true routing"
    assert torch.equal(seen[up], seen[module])
    assert len(seen[down]) == len(chosen)
    rows = own[1].sort(0).values
    assert torch.allclose(seen[down][chosen].sort(0).values, rows, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", mixtures.NAMES)
def test_gradients_are_the_librarys(name):
    model = tiny_mixture(name)
    block, x = block_of(model, start=0)
    layer = model.model.layers[0]
    experts = block.kinds[0].experts
    leaves = {n: value.clone().requires_grad_() for n, value in block.params.items()}
    run(block, x, leaves).square().mean().backward()
    state = {n: v.detach().clone().requires_grad_() for n, v in layer.named_parameters()}
    out = torch.func.functional_call(layer, state, (x,), for_batch(block.kwargs[0], x, x[..., :0]))
    out.square().mean().backward()
    got = put_together(experts, {n.removeprefix("0."): leaf.grad for n, leaf in leaves.items()})
    for parameter, grad in got.items():
        wanted = state[f"{experts.module}.{parameter}"].grad
        assert float(wanted.abs().max()) > 0
        assert torch.allclose(grad, wanted, atol=1e-6 * float(wanted.abs().max()), rtol=1e-3)


def test_a_pass_in_which_one_expert_differs_runs_that_one_alone():
    from lowbit.models.experts_function import ExpertsReplay

    block, x = block_of(tiny_mixture("qwen3-moe"), start=2)
    replay = ExpertsReplay()
    assert torch.equal(run(block, x, replay=replay), run(block, x))
    assert sorted(replay.parts) == [0, 1, 2, 3]
    name = "2.mlp.experts.1.up_proj.weight"
    params = {**block.params, name: block.params[name].roll(1, 0)}
    wanted, got = run(block, x, params), run(block, x, params, replay=replay.alone(1))
    assert float((wanted - run(block, x)).abs().max()) > 0.1
    assert torch.allclose(got, wanted, atol=1e-5)
    others = {n: value if ".experts." not in n or n == name else value * float("nan") for n, value in params.items()}
    gate, down = (f"2.mlp.experts.1.{n}_proj.weight" for n in ("gate", "down"))
    alone = run(block, x, {**others, gate: params[gate], down: params[down]}, replay=replay.alone(1))
    assert torch.equal(alone, got), "another expert has run"


def test_an_experts_inputs_are_quantized_each_in_its_own_format():
    from dataclasses import replace

    from lowbit.quant.activations import IntTokens
    from lowbit.quant.scheme_names import parse_scheme

    block, x = block_of(tiny_mixture("qwen3-moe"), start=2)
    block = planned(block, parse_scheme("w4a8"))
    gate, up = "2.mlp.experts.1.gate_proj", "2.mlp.experts.1.up_proj"
    seen = {}
    taps = {n: lambda value, n=n: seen.__setitem__(n, value) for n in (gate, up)}
    run(block, x, quantized=True, taps=taps)
    assert seen[gate] is seen[up], "linears that share an input and its format share its quantization"
    wanted = block.formats[up].input.fake_quant(seen[up])
    assert torch.allclose(wanted, seen[up], atol=1e-5)
    whole = run(block, x, quantized=True)
    formats = {**block.formats, up: replace(block.formats[up], input=IntTokens(2, symmetric=True))}
    coarse = run(replace(block, formats=formats), x, quantized=True, taps=taps)
    assert len(seen[up][0].unique()) <= 4 < len(seen[gate][0].unique())
    assert not torch.equal(coarse, whole)
