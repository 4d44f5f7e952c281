"""Schemes with rotated heads: the transform, the float function of rotated blocks, and runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.errors import LowbitError
from lowbit.methods.kv_clips import GRID, with_kv_clips
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import relative_error, run, run_all
from lowbit.models.kv_ratios import RATIOS
from lowbit.models.prefix import VALUES
from lowbit.models.rotated_values import with_rotated_values
from lowbit.quant.activations import IntTokens
from lowbit.quant.rotated_kv import RotatedTokens, kv_text
from lowbit.quant.scheme_names import parse_scheme
from lowbit.quant.walsh_hadamard import walsh_hadamard
from runs import quantize_tiny, streamed_logits
from test_prefix import GIVEN, prefix_by_the_library
from tiny import NAMES, block_of, params_of, save_tiny, skeleton_of, tiny_ids, tiny_model

IDS = tiny_ids(2, 20)
KV4H = RotatedTokens(4, symmetric=False)


@dataclass(frozen=True)
class Exact(RotatedTokens):
    """Rotates and rounds nothing."""

    def fake_quant(self, x: Tensor, *args: object) -> Tensor:
        return x

    @property
    def name(self) -> str:
        return "exact-hadamard"


# The transform.


@pytest.mark.parametrize("width", [1, 2, 3, 24, 36, 64, 80, 128])
def test_the_transform_is_orthogonal(width: int) -> None:
    matrix = walsh_hadamard(torch.eye(width, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.mT, torch.eye(width, dtype=torch.float64), atol=1e-12)
    odd = width // (width & -width)
    largest = width**-0.5 if odd == 1 else math.sqrt(2 / width)
    assert float(matrix.abs().max()) <= largest + 1e-12


def test_an_outlier_spreads_over_all_channels() -> None:
    x = torch.zeros(2, 64)
    x[:, 5] = 8.0
    assert torch.equal(walsh_hadamard(x).abs(), torch.ones(2, 64))
    assert walsh_hadamard(x.bfloat16()).dtype == torch.bfloat16


# Blocks.


@pytest.mark.parametrize("name", NAMES)
def test_the_float_function_stays(name: str) -> None:
    block, x = block_of(tiny_model(name), 0, 3, torch.float64)
    exact = replace(block, kv=Exact(4, symmetric=False))
    rotated = with_rotated_values(exact)
    assert not rotated.notes
    y, tolerance = run_all(block, x), 1e-13 if "gemma" in name else 1e-20  # norms in float32
    assert relative_error(run(rotated, x), y) < tolerance
    assert relative_error(run(rotated, x, quantized=True), y) < tolerance
    assert relative_error(run(exact, x, rotated.params), y) < tolerance
    moved = [n for n, value in rotated.params.items() if not torch.equal(value, block.params[n])]
    assert {n.rpartition("_proj")[0].rpartition(".")[2] for n in moved} <= {"v", "o", "qkv", "out"}
    assert len({n.partition(".")[0] for n in moved}) == 3


def test_a_prefix_is_rotated_along() -> None:
    model = tiny_model("qwen3").double()
    prefix, skeleton = prefix_by_the_library(model), skeleton_of(model)
    skeleton.behind(len(GIVEN))
    x = skeleton.embed(IDS)
    block = skeleton.block(0, params_of(model, skeleton, 0, dtype=torch.float64) | prefix.params(0))
    rotated = with_rotated_values(replace(block, kv=Exact(4, symmetric=False)))
    assert relative_error(run(rotated, x, quantized=True), run(block, x)) < 1e-20
    stale = {**rotated.params, f"0.{VALUES}": block.params[f"0.{VALUES}"]}
    assert relative_error(run(rotated, x, stale, quantized=True), run(block, x)) > 1e-6


def with_outlier_channels(block: Block) -> Block:
    """The same function with keys that have a large channel in each head, and values too."""
    params = dict(block.params)
    for name, rows, factor in (("k", 0, 30.0), ("q", 0, 1 / 30.0), ("v", 3, 30.0)):
        weight = params[f"0.self_attn.{name}_proj.weight"].clone().unflatten(0, (-1, 16))
        weight[:, [rows, rows + 8] if name in "qk" else rows] *= factor  # both channels of a rotary pair
        params[f"0.self_attn.{name}_proj.weight"] = weight.flatten(0, 1)
    o = params["0.self_attn.o_proj.weight"].clone().unflatten(1, (-1, 16))
    o[:, :, 3] /= 30.0
    return replace(block, params={**params, "0.self_attn.o_proj.weight": o.flatten(1)})


def test_rotated_heads_lose_less() -> None:
    block, x = block_of(tiny_model("llama"))
    planted = with_outlier_channels(block)
    y = run(block, x)
    assert relative_error(run(planted, x), y) < 1e-9
    plain = replace(planted, kv=IntTokens(4, symmetric=False))
    rotated = with_rotated_values(replace(planted, kv=KV4H))
    errors = [relative_error(run(own, x, quantized=True), y) for own in (plain, rotated)]
    assert errors[1] < 0.75 * errors[0]


def test_clipping_ratios_lower_the_error() -> None:
    """Each layer's are of the grid, lower the block's error, and leave its float function alone."""
    block, x = block_of(tiny_model("llama", head_dim=64), 0, 2)
    y = run(block, x)
    rotated = with_rotated_values(replace(block, kv=KV4H))
    clipped = with_kv_clips(rotated, Calib(x, x, y))
    ratios = torch.stack([clipped.params[f"{index}.{RATIOS}"] for index in range(2)])
    assert ratios.min() < 1
    assert set(ratios.flatten().tolist()) <= set(torch.tensor(GRID).tolist())
    unit = loss_unit(y, "token")
    errors = [float(relative_loss(run(own, x, quantized=True), y, unit)) for own in (rotated, clipped)]
    assert errors[1] < 0.95 * errors[0]
    assert relative_error(run(clipped, x), y) < 1e-9
    assert clipped.record[0]["kv_clips"]["1"] == ratios[1].tolist()
    plain = replace(block, kv=IntTokens(4, symmetric=False))
    assert with_kv_clips(plain, Calib(x, x, y)) is plain


def test_a_ratio_cuts_both_ends() -> None:
    """A range of 15 in steps of 1, cut to 0.8: 12 in steps of 0.8, values beyond at its ends."""
    given = torch.arange(16.0)
    got = IntTokens(4, symmetric=False).fake_quant(given, torch.tensor(0.8), torch.tensor(0.8))
    assert float(got[15]) == pytest.approx(12.0)
    assert float(got[4]) == pytest.approx(4.0)


def test_values_that_cannot_be_rotated_are_noted() -> None:
    block, x = block_of(tiny_model("llama"))
    kinds = tuple(replace(kind, edges=()) for kind in block.kinds)
    fixed = replace(block, kinds=kinds, kv=Exact(4, symmetric=False))
    rotated = with_rotated_values(fixed)
    assert [note.text for note in rotated.notes] == [
        "kv: no matrix folds between v and o in this layer: its values are quantized without a rotation"
    ]
    assert relative_error(run(rotated, x, quantized=True), run(block, x)) < 1e-9


def test_other_schemes_rotate_nothing() -> None:
    block, _ = block_of(tiny_model("llama"))
    for kv in (None, IntTokens(4, symmetric=False)):
        plain = replace(block, kv=kv)
        assert with_rotated_values(plain) is plain


# Schemes and runs.


def test_the_scheme_s_name() -> None:
    scheme = parse_scheme("w4a8kv4hg16-sym")
    assert scheme.kv == KV4H
    assert scheme.weight.group == 16
    assert [kv_text(parse_scheme(name).kv) for name in ("w4a8kv4h", "w4a8kv8", "w4a8")] == ["kv4h", "kv8", ""]
    with pytest.raises(LowbitError, match="3 kv bits given"):
        parse_scheme("w4a8kv3h")


@pytest.mark.parametrize("prefix", ["none", "5,9"])
def test_a_run_is_what_is_loaded(tmp_path: Path, prefix: str) -> None:
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=2)
    done = quantize_tiny(tmp_path / "model", tmp_path / "run", "w8a16kv4h", "smoothquant", prefix=prefix)
    loaded = lowbit.load(done.out)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, streamed_logits(done.out, IDS))
        text = loaded.generate(IDS[:1], max_new_tokens=4, do_sample=False)
        step = loaded(text[:, :-1], use_cache=False).logits[:, -1].argmax(-1)
    assert int(text[0, -1]) == int(step)
    assert done.manifest.runtime_ops == {}
    ratios = loaded.model.layers[1].self_attn.lowbit_kv_ratios
    assert ratios.tolist() == done.manifest.blocks[1].steps["kv_clips"]["1"]
    assert not done.manifest.transformers.loads
    with pytest.raises(LowbitError, match="gguf does not support scheme w8a16kv4h"):
        lowbit.export(done.out, "gguf")
