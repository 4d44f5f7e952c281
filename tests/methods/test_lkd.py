"""Layer-by-layer knowledge distillation: one step against literal gradients, and what training gains."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from method_contract import output_error

from lowbit.errors import LowbitError
from lowbit.methods.gptq import GPTQ
from lowbit.methods.lkd import LayerDistillation, Student
from lowbit.methods.options import with_options
from lowbit.methods.rtn import RTN
from lowbit.models.block import Calib
from lowbit.models.forward import run, run_all
from lowbit.pipeline.recipe import load_recipe
from tiny import block_of, planned, skeleton_of, tiny_ids, tiny_model


@cache
def case(family="opt", scheme="w4a8g16", count=1):
    """A block, hidden states of which the quantized stream is off the float one, and as many nobody trains on."""
    model = tiny_model(family)
    block, x = block_of(model, 1, count)
    block = planned(block, scheme)
    # Other tokens through the layer before: sequences that no training step sees.
    first = block_of(model, 0)[0]
    other = run_all(first, skeleton_of(model).embed(tiny_ids(4, 24, seed=7)))
    noise = 0.05 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    fresh = Calib(other, other, run_all(block, other))
    return block, Calib(x, x + noise, run_all(block, x)), fresh


def step_of(**options):
    """One step on all sequences at once."""
    return with_options(LayerDistillation(**options), epochs=1, batch=4, held_out=0.0, decay="none")


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("loss", ["token", "mse"])
def test_one_step_follows_the_literal_gradient(inputs, loss):
    """Adam's first step is the learning rate in the direction of the gradient's sign, for every entry."""
    block, calib, _ = case(scheme="w4a16g16")
    done = step_of(inputs=inputs, loss=loss, lr=1e-3)(block, calib)
    quantized = {n: block.weight_format(n).fake_quant(block.weight(n), block.qparams(n)) for n in block.linears()}
    leaves = {name: value.clone() for name, value in block.params.items()}
    leaves |= {f"{name}.weight": value for name, value in quantized.items()}
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    x = calib.x_q if inputs == "quantized" else calib.x_fp
    error = (run(block, x, leaves) - calib.y_fp).square()
    if loss == "token":
        error = error.mean(-1) / calib.y_fp.square().mean(-1)
    error.mean().backward()
    checked = 0
    for name, leaf in leaves.items():
        if name.endswith("k_proj.bias"):  # adds the same to all logits of a query: its gradient is rounding noise
            continue
        moved = done.params[name] - block.params[name]
        rate = 1e-3 * float(block.params[f"{name.rpartition('.')[0]}.weight"].square().mean().sqrt())
        wanted = -rate * leaf.grad.sign()
        sure = leaf.grad.abs() > 1e-4 * leaf.grad.abs().max()
        if name.removesuffix(".weight") in quantized:
            # The ends of a group's range pass gradients to its scale, too; straight through is what lies between.
            groups = block.params[name].unflatten(-1, (-1, 16))
            inner = (groups != groups.amax(-1, keepdim=True)) & (groups != groups.amin(-1, keepdim=True))
            sure &= inner.flatten(-2)
        torch.testing.assert_close(moved[sure], wanted[sure], rtol=2e-2, atol=2e-2 * rate, msg=name)
        checked += int(sure.sum())
    assert checked > 0.5 * sum(value.numel() for value in block.params.values())


def test_the_loss_is_that_of_the_quantized_layer():
    block, calib, _ = case()
    step = LayerDistillation(loss="mse")
    chosen = torch.tensor([1, 3])
    got = float(Student(step, block, calib).loss(chosen).detach())
    rounded = RTN()(block, calib)
    y = run(rounded, calib.x_q[chosen], rounded.quantized_params(), quantized=True)
    wanted = (y - calib.y_fp[chosen]).square().mean() / calib.y_fp.square().mean()
    assert got == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("family", ["opt", "llama-odd"])
@pytest.mark.parametrize("options", [{}, {"inputs": "float", "loss": "mse"}], ids=["default", "paper"])
def test_distillation_beats_its_start_also_on_text_it_was_not_trained_on(family, options):
    block, calib, fresh = case(family, "w3a8g16")
    if "inputs" in options:
        calib = replace(calib, x_q=calib.x_fp)
    done = with_options(LayerDistillation(**options), epochs=6)(block, calib)
    figures = done.record[1]["lkd"]
    assert min(figures["held_out"]) < 0.9 * figures["held_out"][0]
    assert output_error(done, calib, RTN()) < 0.8 * output_error(block, calib, RTN())
    assert output_error(done, fresh, RTN()) < 0.95 * output_error(block, fresh, RTN())


def test_each_layer_learns_on_what_the_quantized_layers_before_it_give():
    both, calib, _ = case("llama-odd", "w3a8g16", 2)
    step = with_options(LayerDistillation(), epochs=1)
    done = step(both, calib)
    first = step(both.part(0, 1), replace(calib, y_fp=run_all(both.part(0, 1), calib.x_fp)))
    quantized = RTN()(first, calib)
    x_q = run_all(quantized, calib.x_q, quantized.quantized_params(), quantized=True)
    x_fp = run_all(both.part(0, 1), calib.x_fp)
    second = step(both.part(1, 2), Calib(x_fp, x_q, run_all(both.part(1, 2), x_fp)))
    for name, value in {**first.params, **second.params}.items():
        assert torch.equal(done.params[name], value), name
    assert set(done.record) == {1, 2}


def test_what_is_trained_is_what_the_options_say():
    block, calib, _ = case()
    first, *others = block.linears()
    partly = replace(block, formats={name: block.formats[name] for name in others})
    moved = {
        norms: {
            name
            for name, value in step_of(norms=norms)(partly, calib).params.items()
            if not torch.equal(value, block.params[name])
        }
        for norms in (True, False)
    }
    linears = {f"{name}.{kind}" for name in others for kind in ("weight", "bias")}
    norms = {
        f"1.{norm}.{kind}" for norm in ("self_attn_layer_norm", "final_layer_norm") for kind in ("weight", "bias")
    }
    # k's bias adds the same to all logits of a query: it has no gradient.
    assert moved[False] - {"1.self_attn.k_proj.bias"} == linears - {"1.self_attn.k_proj.bias"}
    assert moved[True] - moved[False] == norms
    assert f"{first}.weight" not in moved[True]


def test_gptq_may_choose_the_codes_behind_it():
    block, calib, _ = case("llama-odd", "w3a8g16")
    done = with_options(LayerDistillation(), epochs=2)(block, calib)
    assert output_error(done, calib, GPTQ()) < output_error(block, calib, RTN())


def test_recipes_and_refusals():
    (name, own), (last, _) = load_recipe("zeroquant").steps
    assert (name, last, own.inputs, own.loss) == ("lkd", "rtn", "quantized", "token")
    (_, paper), _ = load_recipe("zeroquant-lkd").steps
    assert (paper.inputs, paper.loss) == ("float", "mse")
    with pytest.raises(LowbitError, match=r"lkd\.inputs 'x'"):
        LayerDistillation(inputs="x")
    with pytest.raises(LowbitError, match=r"lkd\.lr -1 given; it must be 0 or more"):
        LayerDistillation(lr=-1.0)
