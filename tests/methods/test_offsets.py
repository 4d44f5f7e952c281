"""Copies that round differently: Hermite's identity, an unchanged float function, less error, every reader."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import lowbit
from lowbit.errors import LowbitError
from lowbit.methods import GPTQ, RTN
from lowbit.methods.offsets import copy_offsets, offset_weight, with_offsets
from lowbit.methods.reassemble import Reassemble, fold
from lowbit.models.block import Calib
from lowbit.models.forward import relative_error, run, run_all, run_quantized
from lowbit.pipeline.recipe import Recipe
from lowbit.quant.activations import IntTokens
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme_names import parse_scheme, with_overrides
from lowbit.runs.streamed_model import StreamedModel
from tiny import block_of, planned, save_tiny, tiny_ids, tiny_model

DOWN_ALONE = {"*self_attn*": "float", "*gate*": "float", "*up*": "float"}


def quantized(folder, out, steps):
    """The run of a recipe of ``steps`` at w4a4, of the model in ``folder``."""
    text = str(folder / "calib.txt")
    return lowbit.quantize(
        str(folder), out, scheme="w4a4", recipe=Recipe("r", steps), data=text, samples=4, length=24
    )


def split(columns, channel, times):
    """Indices and copies with ``channel`` ``times`` over, at the places of the first others."""
    idx = torch.arange(columns)
    idx[[k for k in range(columns) if k != channel][: times - 1]] = channel
    copies = torch.ones(columns, dtype=torch.long)
    copies[channel] = times
    return idx, copies


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("times", [2, 3, 5])
def test_copies_of_an_activation_add_up_to_a_finer_rounding(times, symmetric):
    """Hermite's identity through ``IntTokens``, away from the ends of the range."""
    idx, copies = split(12, 7, times)
    offsets = copy_offsets(idx, copies)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-3, 3)
    x[:, 7] = times * (0.4 * x[:, 7]).clamp(-1, 1)
    x[:, 10], x[:, 11] = 3, -3  # the ends of every range
    gathered = x[:, idx] / copies[idx]
    format = IntTokens(4, symmetric=symmetric)
    found = format.fake_quant(gathered, offset=offsets)[:, idx == 7].sum(1)
    step = 6 / 15
    torch.testing.assert_close(found, torch.floor(x[:, 7] / step + 0.5) * step, rtol=0, atol=1e-9)
    plain = format.fake_quant(gathered)[:, idx == 7].sum(1)
    assert float((found - x[:, 7]).square().sum()) < 0.5 * float((plain - x[:, 7]).square().sum())
    alone = idx != 7
    assert torch.equal(format.fake_quant(gathered, offset=offsets)[:, alone], format.fake_quant(gathered)[:, alone])


@pytest.mark.parametrize("times", [2, 3, 5])
def test_offsets_of_weights_keep_sum_range_and_qparams_and_round_finer(times):
    idx, copies = split(64, 40, times)
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:, idx]
    format = IntFormat(3, symmetric=False)
    qparams = format.qparams(weight)
    moved = offset_weight(weight, qparams.scale, copy_offsets(idx, copies), idx)
    torch.testing.assert_close(moved[:, idx == 40].sum(1), weight[:, idx == 40].sum(1), rtol=0, atol=1e-12)
    assert torch.equal(moved[:, idx != 40], weight[:, idx != 40])
    assert torch.equal(format.qparams(moved).scale, qparams.scale)
    sums = [format.fake_quant(w, qparams)[:, idx == 40].sum(1) for w in (moved, weight)]
    wanted = weight[:, idx == 40].sum(1)
    errors = [float((found - wanted).square().sum()) for found in sums]
    assert errors[0] < errors[1] / times  # times squared, but for those near the ends of their rows' ranges
    fine = qparams.scale[:, 0]
    inside = ((weight[:, 40] - weight.amin(1)) > fine) & ((weight.amax(1) - weight[:, 40]) > fine)
    # Copies sum to T w: Hermite's identity rounds that to whole steps
    torch.testing.assert_close(sums[0][inside], ((wanted / fine).round() * fine)[inside], rtol=0, atol=1e-9)


def test_products_of_two_roundings_do_not_add_up_their_errors():
    """With the same order on both sides the sum over copies of w a is biased; by parity the bias cancels."""
    generator = torch.Generator().manual_seed(2)
    idx, copies = split(64, 40, 2)
    weight = torch.randn(400, 64, generator=generator, dtype=torch.float64)[:, idx]
    format = IntFormat(4, symmetric=False)
    qparams, offsets = format.qparams(weight), copy_offsets(idx, copies)
    x = torch.randn(300, 64, generator=generator, dtype=torch.float64)[:, idx] / copies[idx]
    x_q = IntTokens(4, symmetric=False).fake_quant(x, offset=offsets)[:, idx == 40]
    bias = []
    for moved in (
        offset_weight(weight, qparams.scale, offsets, idx),
        weight + qparams.scale * offsets,
    ):
        error = x_q @ format.fake_quant(moved, qparams)[:, idx == 40].T - x[:, idx == 40] @ weight[:, idx == 40].T
        bias.append(abs(float(error.mean())))
    assert bias[0] < 0.3 * bias[1]


@cache
def down_case(dtype=torch.float32, scheme="w4a4"):
    """A layer with outlier channels before down_proj."""
    block, x = block_of(tiny_model("llama"), 1, dtype=dtype)
    block = planned(block, scheme)
    edge = next(edge for edge in block.edges() if edge.kind == "channels")
    up = block.params[edge.src.parameter].clone()
    up[[5, 9]] *= 30
    block = replace(block, params={**block.params, edge.src.parameter: up})
    return block, edge, Calib(x, x, run_all(block, x))


@pytest.mark.parametrize("kind", ["weights", "both"])
def test_the_float_function_stays(kind):
    block, edge, calib = down_case(torch.float64)
    (down,) = [dst.module for dst in edge.readers]
    idx, copies = split(96, 5, 3)
    folded = fold(block, edge, idx, copies[idx].double(), block.weight(down).double())
    done = with_offsets(folded, [down], idx, copies, kind)
    assert not torch.equal(done.weight(down), folded.weight(down))
    torch.testing.assert_close(run(done, calib.x_fp), run(folded, calib.x_fp), rtol=1e-9, atol=1e-9)
    assert set(done.ops) == ({down} if kind == "both" else set())
    assert torch.equal(folded.weight(down), block.weight(down)[:, idx])


def test_each_kind_lowers_the_error_of_the_quantized_layer():
    block, edge, calib = down_case(scheme=with_overrides(parse_scheme("w4a4"), DOWN_ALONE))
    (down,) = [dst.module for dst in edge.readers]
    idx, copies = split(96, 5, 4)
    folded = fold(block, edge, idx, copies[idx].double(), block.weight(down).double())
    calib = replace(calib, y_fp=run_all(folded, calib.x_fp))  # what was dropped is another matter
    errors = {}
    for kind in ("none", "weights", "both"):
        quantized = RTN()(with_offsets(folded, [down], idx, copies, kind), calib)
        errors[kind] = relative_error(run_quantized(quantized, calib.x_q), calib.y_fp)
    assert errors["both"] < errors["weights"] < errors["none"]


def test_gptq_after_the_split_rounds_what_the_copy_before_left_over():
    block, edge, calib = down_case(scheme=with_overrides(parse_scheme("w3a16"), DOWN_ALONE))
    (down,) = [dst.module for dst in edge.readers]
    idx, copies = split(96, 5, 4)
    folded = fold(block, edge, idx, copies[idx].double(), block.weight(down).double())
    wanted = folded.weight(down)[:, idx == 5].sum(1)
    errors = {}
    for name, step in (("rtn", RTN()), ("gptq", GPTQ())):
        q = step(folded, calib).qweights[down]
        errors[name] = float((q.dequantize()[:, idx == 5].sum(1) - wanted).square().sum())
    assert errors["gptq"] < 0.5 * errors["rtn"]


@pytest.mark.parametrize(("kind", "name"), [("both", "llama-odd"), ("weights", "llama-odd"), ("both", "opt")])
def test_offsets_reach_every_reader_of_the_folder(kind, name, tmp_path):
    save_tiny(tmp_path / "m", name)
    steps = (("reassemble", Reassemble(sites="all", most=0.3, offsets=kind)), ("rtn", RTN()))
    manifest = quantized(tmp_path / "m", tmp_path / "out", steps).manifest
    ops = manifest.runtime_ops
    assert {name for name in ops if name in manifest.quantized} == {n for n, op in ops.items() if op == "clip"}
    assert ("clip" in ops.values()) == (kind == "both")
    assert ("rounding offsets before" in manifest.transformers.why_not) == (kind == "both")
    ids = tiny_ids()
    simulated = torch.cat([logits for _, logits in StreamedModel(tmp_path / "out").logits(ids)])
    loaded = lowbit.load(tmp_path / "out")(ids, use_cache=False).logits.detach()
    assert float((loaded - simulated).abs().max() / simulated.abs().max()) < 1e-5


def test_what_does_not_add_up_is_refused():
    block, _, calib = down_case(scheme="w4a4g16")
    with pytest.raises(LowbitError, match="copies in different groups have different steps"):
        Reassemble(most=0.3, offsets="weights")(block, calib)
    with pytest.raises(LowbitError, match="did you mean 'weights'"):
        Reassemble(offsets="weight")
