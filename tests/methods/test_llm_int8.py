"""LLM.int8(): equation 8 against a literal product, the columns that are kept, and what they are worth."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from cases import FEW, outliers
from method_contract import output_error

import lowbit
from lowbit.errors import LowbitError
from lowbit.methods.llm_int8 import LLMInt8, outlier_columns
from lowbit.methods.rtn import RTN
from lowbit.models.block import Calib
from lowbit.models.forward import run_all, run_quantized
from lowbit.models.outlier_columns import OutlierColumns
from lowbit.pipeline.recipe import recipe_from_dict
from lowbit.runs.manifest import manifest_of
from runs import quantize_tiny, streamed_logits
from tiny import block_of, planned, save_tiny, tiny_ids, tiny_model


@cache
def case(scheme="w8a8-sym", times=300.0):
    block, x = block_of(tiny_model("opt"), 1)
    block = planned(outliers(block, times=times), scheme)
    return block, Calib(x, x, run_all(block, x))


def int8(rows):
    """Vector-wise symmetric quantization of ``(rows, n)`` as the paper has it, up to the step of a row's range."""
    step = rows.abs().amax(1, keepdim=True) / 127.5
    return (rows / step).round().clamp(-128, 127) * step


def test_equation_8():
    """The product in two parts, each literal; the scales of weights are stored in float16."""
    block, calib = case()
    done = LLMInt8()(block, calib)
    name = block.linears()[0]
    op, seen = done.ops[name], []
    run_all(block, calib.x_q, taps={name: seen.append})
    x = torch.cat(seen).flatten(0, -2)
    outlier = x.abs().amax(0) > 6.0
    assert torch.equal(op.kept.bool(), outlier)
    assert 0 < int(outlier.sum()) < len(outlier)
    weight, rest = block.weight(name), ~outlier
    wanted = x[:, outlier] @ weight[:, outlier].half().float().T + int8(x[:, rest]) @ int8(weight[:, rest]).T
    got = op(x, block.input_format(name)) @ done.dequantized(name).T
    exact = x @ weight.T
    # The two differ by the stored precision of the scales, far below the error of the quantization itself.
    assert float((got - wanted).norm()) < 0.2 * float((wanted - exact).norm())
    codes = done.qweights[name].codes[:, outlier]
    assert bool((codes == 128).all()), "codes of outlier columns are zeros"


def test_the_row_scales_are_those_of_the_rest():
    block, calib = case()
    params = dict(block.params)
    name = block.linears()[0]
    params[f"{name}.weight"] = block.weight(name).clone()
    params[f"{name}.weight"][:, list(FEW)] *= 1e4
    big = replace(block, params=params)
    done = LLMInt8()(big, replace(calib, y_fp=run_all(big, calib.x_fp)))
    plain = LLMInt8(threshold=1e9)(big, calib)
    ratio = plain.qweights[name].qparams.scale / done.qweights[name].qparams.scale
    assert float(ratio.median()) > 5
    rest = ~done.ops[name].kept.bool()
    wanted = block.weight(name)[:, rest].abs().amax(1, keepdim=True) / 127.5
    torch.testing.assert_close(done.qweights[name].qparams.scale, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scheme", ["w8a8-sym", "w8a8", "w8afp8", "w8a16", "w4a4g16"])
def test_outliers_kept_leave_a_small_part_of_the_error(scheme):
    block, calib = case(scheme)
    share = output_error(block, calib, LLMInt8()) / output_error(block, calib, RTN())
    assert share < (1.05 if scheme in ("w8a16", "w8afp8") else 0.05)


def test_a_threshold_above_all_inputs_is_round_to_nearest():
    block, calib = case()
    done = LLMInt8(threshold=1e9)(block, calib)
    assert not done.ops
    for name, q in RTN()(block, calib).qweights.items():
        assert torch.equal(done.qweights[name].codes, q.codes)
    everything = LLMInt8(threshold=1e-9)(block, calib)
    error = output_error(block, calib, LLMInt8(threshold=1e-9))
    assert all(int(op.kept.sum()) >= op.width - 8 for op in everything.ops.values())  # a dead ReLU never exceeds it
    assert error < 1e-5  # float16 columns are all that differs


def test_static_inputs_keep_no_columns_and_a_note_says_so():
    block, calib = case("w8a8-static")
    done = LLMInt8()(block, calib)
    assert not done.ops
    assert "no columns kept where inputs have stored ranges" in done.notes[-1].text
    assert torch.isfinite(run_quantized(done, calib.x_q)).all()


def test_refusals():
    with pytest.raises(LowbitError, match=r"llm-int8\.threshold 0 given; it must be above 0"):
        LLMInt8(0.0)
    block, _ = case()
    name = block.linears()[0]
    huge = replace(block, params={**block.params, f"{name}.weight": block.weight(name) * 1e9})
    with pytest.raises(LowbitError, match="has weights beyond float16 in its outlier columns; choose another recipe"):
        outlier_columns(huge, name, torch.arange(64) == 5)


# A run on disk.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model with planted outliers, whose own samples are the text, and its runs."""
    folder = tmp_path_factory.mktemp("int8")
    model = save_tiny(folder / "model", "opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            for norm, readers in (
                (
                    layer.self_attn_layer_norm,
                    (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                ),
                (layer.final_layer_norm, (layer.fc1,)),
            ):
                for parameter in (norm.weight, norm.bias):
                    parameter[list(FEW)] *= 1000.0
                for linear in readers:
                    linear.weight[:, list(FEW)] /= 1000.0
    model.save_pretrained(folder / "model")
    runs = {}
    for recipe in ("rtn", "llm-int8"):
        quantize_tiny(folder / "model", folder / recipe, "w8a8-sym", recipe)
        runs[recipe] = folder / recipe
    return folder / "model", runs


def test_perplexity_stays_within_half_a_per_cent_where_plain_int8_does_not(folders):
    model, runs = folders
    ids = tiny_ids(8, 24, seed=9)
    with torch.no_grad():
        exact = streamed_logits(model, ids).log_softmax(-1)
        # The float model's own distribution as the text: every other model's perplexity on it is higher.
        float_loss = -(exact.exp() * exact).sum(-1).mean()
        losses = {
            name: -(exact.exp() * streamed_logits(run, ids).log_softmax(-1)).sum(-1).mean()
            for name, run in runs.items()
        }
    excess = {name: float((loss - float_loss).exp()) - 1 for name, loss in losses.items()}
    assert 0 <= excess["llm-int8"] < 0.005
    assert excess["rtn"] > 0.02


def test_load_computes_what_was_evaluated_and_its_cost_counts(folders):
    _, runs = folders
    ids = tiny_ids(2, 16, seed=3)
    model = lowbit.load(runs["llm-int8"])
    with torch.no_grad():
        ours = model(ids).logits
    torch.testing.assert_close(ours, streamed_logits(runs["llm-int8"], ids), rtol=1e-4, atol=1e-4)
    plain, kept = manifest_of(runs["rtn"]), manifest_of(runs["llm-int8"])
    assert set(kept.runtime_ops.values()) == {"outlier-columns"}
    figures = [row.steps["llm-int8"] for row in kept.blocks]
    ops_bits = weights = 0
    for index, step in enumerate(figures):
        for name, found in step.items():
            rows, width = model.get_submodule(f"model.decoder.layers.{name}").weight.shape
            weights += rows * width
            if found["outlier_columns"]:
                ops_bits += 16 * rows * found["outlier_columns"] + 8 * width
            assert name.startswith(f"{index}.")
    assert kept.bits_per_weight == pytest.approx(plain.bits_per_weight + ops_bits / weights)
    assert "linears with columns in 16 bits stay online" in kept.transformers.why_not
    with pytest.raises(LowbitError, match="columns in 16 bits"):
        model.save_pretrained("nowhere")
    with pytest.raises(LowbitError, match="linears with columns in 16 bits"):
        lowbit.export(runs["llm-int8"], "vllm", out=runs["llm-int8"].parent / "vllm")


def test_the_op_in_the_run_is_the_op_of_the_method(folders):
    _, runs = folders
    model = lowbit.load(runs["llm-int8"])
    ops = [module for name, module in model.named_modules() if name.endswith(".runtime")]
    assert ops
    assert all(module.kind is OutlierColumns for module in ops)


def test_end_to_end_tuning_behind_it_ships_what_it_trains(folders, tmp_path):
    model, _ = folders
    steps = {"steps": [{"llm-int8": {}}, {"tune": {"epochs": 2}}]}
    out = quantize_tiny(model, tmp_path / "tuned", "w8a8-sym", recipe_from_dict(steps, "both"), effort="paper").out
    ids = tiny_ids(2, 16, seed=3)
    with torch.no_grad():
        ours = lowbit.load(out)(ids).logits
    torch.testing.assert_close(ours, streamed_logits(out, ids), rtol=1e-4, atol=1e-4)
    assert set(manifest_of(out).runtime_ops.values()) == {"outlier-columns"}
