"""A folder in transformers' gemma layout holds the run's own codes, and stock transformers computes its logits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.exporters import gemma
from lowbit.exporters.gemma import decode, pack, store
from lowbit.exporters.run import open_run
from lowbit.quant.format import QTensor
from lowbit.quant.integer import IntFormat
from tiny import spoil, tiny_ids

pytest.importorskip("transformers.integrations.gemma_quant", reason="transformers before 5.24 lacks the layout")

MIXED = {"lm_head": "w8", "model.embed_tokens": "w4", "*.down_proj": "w2", "*.1.self_attn.o_proj": "float"}
EVERYWHERE = {"*.0.self_attn.*": "w2", "*.1.self_attn.o*": "float", "*embed_tokens": "w8", "lm_head": "w4"}
SHARD = "block-00001.safetensors"
UP = "model.layers.1.mlp.up_proj"


def made(bits: int) -> QTensor:
    format = IntFormat(bits)
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(bits))
    return format.quantize(weight, format.qparams(weight))


def by_hand(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes, one at a time."""
    if bits == 8:
        return stored.int()
    rows = [
        [byte >> shift & (1 << bits) - 1 for byte in row for shift in range(0, 8, bits)] for row in stored.tolist()
    ]
    return torch.tensor(rows) - 2 ** (bits - 1)


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_by_hand_and_by_the_classes_of_transformers(bits: int, embedding: bool) -> None:
    q = made(bits)
    codes = by_hand(pack(q), bits)
    assert torch.equal(codes, q.codes.int() - 2 ** (bits - 1))
    assert {int(codes.min()), int(codes.max())} <= set(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert torch.equal(decode(store(q, embedding), bits), q.dequantize())
    assert torch.equal(codes * q.qparams.scale, q.dequantize())


@pytest.mark.parametrize("scheme", ["w2a16-sym", "w4a16-sym", "w8a16-sym"])
def test_it_reads_back_bit_for_bit(run_of: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    run = run_of(scheme, overrides=MIXED)
    out = lowbit.export(run, "gemma", out=tmp_path / "out").out
    (found,) = lowbit.verify(run, [out], logits=False)
    assert found.ok, (found.differs, found.other, found.unreadable)
    assert found.target == "gemma"
    assert found.exact == found.tensors > 20
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["num_bits"] == int(scheme[1])
    assert config["quantize_embeddings"]
    assert config["modules_to_not_convert"] == ["model.layers.1.self_attn.o_proj"]
    with_another = {
        re.sub(r"[\\^$]", "", name): own["num_bits"] for name, own in config["module_quant_configs"].items()
    }
    assert with_another == {
        name: q.format.elements.bits
        for name in open_run(run).quantized
        if (q := open_run(run).qtensor(name)).format.elements.bits != config["num_bits"]
    }


@pytest.mark.parametrize("scheme", ["w4a8-sym-static", "w8a8-sym-static"])
def test_static_inputs_are_read_back_and_run_in_stock_transformers(
    run_of: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    run = run_of(scheme, overrides=EVERYWHERE)
    out = lowbit.export(run, "gemma", out=tmp_path / "out").out
    (found,) = lowbit.verify(run, [out], logits=False)
    assert found.ok, (found.differs, found.other, found.unreadable)
    scales = {name: open_run(run).tensor(name) for name in open_run(run).inputs}
    assert len(scales) > 6
    stored = load_file(out / SHARD)
    assert torch.equal(stored[f"{UP}.input_activation_scale"], scales[f"{UP}.input_scale"].reshape(()))
    assert all(float(value) == 0 for name, value in stored.items() if name.endswith("output_activation_scale"))
    ids = tiny_ids(2, 12)
    with torch.no_grad():
        ours = lowbit.load(run)(ids).logits
        model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        theirs = model(ids).logits
        model.get_submodule(UP).input_activation_scale.zero_()
        others = model(ids).logits
    assert torch.equal(theirs, ours)
    assert not torch.equal(others, ours)


def test_another_scale_of_an_input_is_named(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("w4a8-sym-static")
    out = lowbit.export(run, "gemma", out=tmp_path / "out").out
    for value in (0.5, 0.0):
        save_file({**load_file(out / SHARD), f"{UP}.input_activation_scale": torch.tensor(value)}, out / SHARD)
        assert lowbit.verify(run, [out], logits=False)[0].differs == [f"{UP}.input_scale"]


def test_a_scale_where_inputs_are_float_is_named(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("w4a16-sym")
    out = lowbit.export(run, "gemma", out=tmp_path / "out").out
    save_file({**load_file(out / SHARD), f"{UP}.input_activation_scale": torch.tensor(0.5)}, out / SHARD)
    assert lowbit.verify(run, [out], logits=False)[0].differs == [f"{UP}.input_scale"]


@pytest.mark.parametrize("family", ["llama", "llama-odd", "qwen2", "gemma2", "gemma3", "phi3", "smollm3", "opt"])
@pytest.mark.parametrize("overrides", [{}, EVERYWHERE], ids=["linears", "everywhere"])
def test_stock_transformers_gives_the_logits_of_the_run(
    run_of: Callable[..., Path], tmp_path: Path, family: str, overrides: dict[str, str]
) -> None:
    run = run_of("w4a16-sym", family, overrides=overrides)
    out = lowbit.export(run, "gemma", out=tmp_path / "out").out
    ids = tiny_ids(2, 12)
    with torch.no_grad():
        ours = lowbit.load(run)(ids).logits
        model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        theirs = model(ids).logits
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("QuantizedLinear") == len(open_run(run).quantized) - bool(overrides)
    assert kinds.count("QuantizedEmbedding") == bool(overrides)
    assert theirs.std() > 0
    assert torch.equal(theirs, ours)


@pytest.mark.heavy
def test_verify_runs_it_in_stock_transformers(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("w4a16-sym", overrides=MIXED)
    out = lowbit.export(run, "gemma", out=tmp_path / "out").out
    (found,) = lowbit.verify(run, [out])
    assert found.ok
    assert found.logits is not None
    assert found.logits < 1e-6


@pytest.mark.parametrize("key", ["weight", "weight_scale"])
def test_one_wrong_byte_is_named(run_of: Callable[..., Path], tmp_path: Path, key: str) -> None:
    run = run_of("w4a16-sym", overrides=MIXED)
    out = lowbit.export(run, "gemma", out=tmp_path / "out").out
    spoil(out / SHARD, f"{UP}.{key}")
    assert lowbit.verify(run, [out], logits=False)[0].differs == [f"{UP}.weight"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("output_activation_scale", torch.tensor(0.1), f"'{UP}' cannot be read: output_activation_scale is not 0"),
        ("weight", torch.zeros(96, 64), "weight is torch.float32 of .*, not torch.uint8"),
        (
            "weight_scale",
            torch.ones(96, 2),
            r"weight_scale is torch.float32 of \[96, 2\], not torch.float32 of \[96, 1\]",
        ),
    ],
)
def test_what_would_run_otherwise_is_named(
    run_of: Callable[..., Path], tmp_path: Path, key: str, value: torch.Tensor, message: str
) -> None:
    run = run_of("w4a16-sym")
    out = lowbit.export(run, "gemma", out=tmp_path / "out").out
    save_file({**load_file(out / SHARD), f"{UP}.{key}": value}, out / SHARD)
    (found,) = lowbit.verify(run, [out], logits=False)
    assert re.search(message, found.unreadable or "")


def test_without_the_layout_in_transformers_it_is_written_but_not_called_right(
    run_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("w4a16-sym")
    monkeypatch.setattr(gemma, "loads", lambda: False)
    out = lowbit.export(run, "gemma", out=tmp_path / "out").out
    (found,) = lowbit.verify(run, [out])
    assert not found.ok
    assert "pip install 'transformers>=5.24'" in (found.unreadable or "")
    assert gemma.execute(out, tiny_ids()[0]) is None


@pytest.mark.parametrize(
    ("scheme", "overrides", "message"),
    [
        ("w4a8-sym", {}, r"act: .*a8-sym; the layout has 8 bits, symmetric, .*; nearest that fits: w4a16-sym$"),
        ("w4a8-static", {}, r"act: .*a8-asym-static; .*nearest that fits: w4a8-sym-static$"),
        ("w4a16-sym-static", {}, r"act: .*a16-sym-static; .*nearest that fits: w4a16-sym$"),
        ("w3a8-sym-static", {}, r"weight: .*3 bits.*nearest that fits: w[24]a8-sym-static$"),
        ("w4a16-asym", {}, r"weight: .*asymmetric.*nearest that fits: w4a16-sym$"),
        ("w4a16g32-sym", {}, r"weight: .*groups of 32.*nearest that fits: w4a16-sym$"),
        ("w3a16-sym", {}, r"weight: .*3 bits.*nearest that fits: w[24]a16-sym$"),
        ("w4a16kv4", {}, r"kv: .*nearest that fits: w4a16-sym$"),
        ("nvfp4a16", {}, r"weight: .*the format nvfp4; nearest that fits: w4a16-sym$"),
        ("w4a16-sym", {"*.down_proj": "w6"}, r"override .*6 bits.*--override '\*\.down_proj=w8-sym'$"),
    ],
)
def test_what_does_not_fit_is_refused(
    refusal_of: Callable[..., str], scheme: str, overrides: dict[str, str], message: str
) -> None:
    assert re.search(message, refusal_of("gemma", scheme, overrides=overrides))
