"""A GPTQ folder holds the run's own codes and qparams, in either convention, as onnxruntime-genai's loader finds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.exporters.gptq import pack_module, unpack_words
from lowbit.exporters.run import open_run
from lowbit.quant.format import QParams, QTensor
from lowbit.quant.integer import IntFormat
from tiny import spoil


@pytest.fixture(scope="module")
def run(run_of: Callable[..., Path]) -> Path:
    return run_of("w4a16g32-sym")


SCHEMES = ["w2a16g32-asym", "w3a16-sym", "w3a16g32-asym", "w4a16g32-sym", "w4a16g16-asym", "w8a16-asym"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("convention", ["v1", "v2"])
def test_it_reads_back_bit_for_bit(run_of: Callable[..., Path], tmp_path: Path, scheme: str, convention: str) -> None:
    run = run_of(scheme)
    made = lowbit.export(run, "gptq", out=tmp_path / "gptq", gptq_format=convention)
    (found,) = lowbit.verify(run, [made.out])
    assert found.ok
    assert found.target == "gptq"
    assert found.exact == found.tensors > 20


@pytest.mark.parametrize("family", ["llama-odd", "qwen2", "qwen3", "gemma2", "phi3", "opt"])
def test_every_family(run_of: Callable[..., Path], tmp_path: Path, family: str) -> None:
    run = run_of("w4a16g16-sym", family)
    assert lowbit.verify(run, [lowbit.export(run, "gptq", out=tmp_path / "gptq").out])[0].ok


def test_modules_with_a_format_of_their_own(run_of: Callable[..., Path], tmp_path: Path) -> None:
    overrides = {"*.down_proj": "w8g32", "*.1.self_attn.o_proj": "float", "lm_head": "w4"}
    run = run_of("w4a16g32-sym", overrides=overrides)
    made = lowbit.export(run, "gptq", out=tmp_path / "gptq")
    assert lowbit.verify(run, [made.out])[0].ok
    config = json.loads((made.out / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["lm_head"]) == (4, 32, True)
    assert config["dynamic"][r"+:model\.layers\.0\.mlp\.down_proj(\.|$)"]["bits"] == 8
    assert r"-:model\.layers\.1\.self_attn\.o_proj(\.|$)" in config["dynamic"]


def override_of(dynamic: dict[str, Any], layer: str) -> Any:
    """A layer's formats as vLLM and SGLang find them: the first pattern that matches from the beginning."""
    for pattern, own in dynamic.items():
        if re.match(pattern[2:], layer):
            return own if pattern.startswith("+:") else False
    return None


def test_fused_linears_are_found_by_their_own_name(run_of: Callable[..., Path], tmp_path: Path) -> None:
    """Where all members have one format or none does; by the members' names too, which other loaders look up."""
    overrides = {"*.0.self_attn.[qkv]_proj": "w8g32", "*.1.mlp.gate_proj": "float", "*.1.mlp.up_proj": "float"}
    run = run_of("w4a16g32-sym", overrides=overrides)
    made = lowbit.export(run, "gptq", out=tmp_path / "gptq")
    assert made.warnings == []
    assert lowbit.verify(run, [made.out])[0].ok
    dynamic = json.loads((made.out / "config.json").read_text())["quantization_config"]["dynamic"]
    for name in ("q_proj", "v_proj", "qkv_proj"):
        assert override_of(dynamic, f"model.layers.0.self_attn.{name}")["bits"] == 8
        assert override_of(dynamic, f"model.layers.1.self_attn.{name}") is None
    for name in ("gate_proj", "up_proj", "gate_up_proj"):
        assert override_of(dynamic, f"model.layers.1.mlp.{name}") is False
        assert override_of(dynamic, f"model.layers.0.mlp.{name}") is None


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_fused_linears_whose_formats_differ_are_said(
    target: str, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of("w4a16g32-sym", overrides={"*.1.self_attn.k_proj": "float", "*.2.mlp.up_proj": "float"})
    made = lowbit.export(run, target, out=tmp_path / "out")
    assert made.warnings == [
        "vLLM and SGLang fuse linears whose formats differ, in 2 places such as model.layers.1.self_attn.q_proj with "
        "k_proj and v_proj, and do not read them: give these one format there; other loaders read each by itself"
    ]
    config = json.loads((made.out / "config.json").read_text())["quantization_config"]
    assert "qkv_proj" not in json.dumps(config)
    assert lowbit.verify(run, [made.out])[0].ok


def test_an_awq_folder_names_fused_linears_that_stay_float(run_of: Callable[..., Path], tmp_path: Path) -> None:
    """vLLM looks for a name of the list within the name of the layer that it builds."""
    run = run_of("w4a16g32-sym", overrides={"*.1.self_attn.[qkv]_proj": "float"})
    made = lowbit.export(run, "awq", out=tmp_path / "awq")
    assert made.warnings == []
    config = json.loads((made.out / "config.json").read_text())["quantization_config"]
    skipped = config["modules_to_not_convert"]
    assert any(name in "model.layers.1.self_attn.qkv_proj" for name in skipped)
    assert not any(name in "model.layers.0.self_attn.qkv_proj" for name in skipped)
    assert "model.layers.1.self_attn.k_proj" in skipped
    assert lowbit.verify(run, [made.out])[0].ok


@pytest.mark.parametrize("scheme", ["w2a16g16-asym", "w4a16g32-sym", "w4a16-asym", "w8a16g32-asym"])
def test_the_loader_of_onnxruntime_genai_finds_the_same_codes(
    run_of: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    loader = pytest.importorskip("onnxruntime_genai.models.loaders.gptq")
    folder = run_of(scheme)
    made = lowbit.export(folder, "gptq", out=tmp_path / "gptq", gptq_format="v1")
    config = json.loads((made.out / "config.json").read_text())["quantization_config"]
    attributes = {"config": config, "use_g_idx": config["desc_act"]}
    theirs = loader.GPTQModel("gptq", made.out, attributes, 64, 32, 96, 3)
    run = open_run(folder)
    for layer in theirs.layers:
        for part, name in ((layer.self_attn, "self_attn"), (layer.mlp, "mlp")):
            for linear, module in vars(part).items():
                if getattr(module, "qweight", None) is None:
                    continue
                q = run.qtensor(f"model.layers.{layer.layer_id}.{name}.{linear}")
                # Its form is that of MatMulNBits: (out, blocks, bytes of a block), low bits first.
                bits = q.format.elements.bits
                codes = bits_of(module.qweight.flatten(1), bits)
                assert torch.equal(codes[:, : q.codes.shape[1]], q.codes.long())
                assert torch.equal(module.scales.view_as(q.qparams.scale), q.qparams.scale.half())
                zeros = bits_of(module.qzeros.view(len(q.codes), -1), bits)
                assert torch.equal(zeros[:, : q.qparams.zero.shape[1]], q.qparams.zero.long())


def bits_of(content: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = torch.arange(0, 8, bits)
    return (content.long()[..., None] >> shifts & 2**bits - 1).flatten(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_one_bit_stream_as_a_literal_loop_writes_it(bits: int) -> None:
    format = IntFormat(bits, 32, symmetric=False)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(bits))
    q = format.quantize(weight, format.qparams(weight))
    stored = pack_module(q, "gptq_v2")
    for column in range(64):
        for row in range(32):
            word, bit = divmod(column * bits, 32)
            both = int(stored["qweight"][word, row]) & 0xFFFFFFFF
            if word + 1 < len(stored["qweight"]):
                both |= (int(stored["qweight"][word + 1, row]) & 0xFFFFFFFF) << 32
            assert both >> bit & 2**bits - 1 == int(q.codes[row, column])
    assert torch.equal(unpack_words(stored["qzeros"], bits, 32).T, q.qparams.zero.long())


def test_golden_words() -> None:
    # Codes 0 .. 7 in every row: 0x76543210 along the input. Zero 8 is 7 in v1, 8 in v2.
    codes = torch.arange(8, dtype=torch.uint8).expand(8, 8).contiguous()
    q = QTensor(codes, QParams(torch.full((8, 1), 0.5), torch.full((8, 1), 8.0)), IntFormat(4))
    v1, v2 = pack_module(q, "gptq"), pack_module(q, "gptq_v2")
    assert v1["qweight"].tolist() == [[0x76543210] * 8]
    assert v1["qzeros"].tolist() == [[0x77777777]]
    assert v2["qzeros"].tolist() == [[0x88888888 - 2**32]]
    assert v1["scales"].tolist() == [[0.5] * 8]
    assert v1["g_idx"].tolist() == [0] * 8


def test_symmetric_goes_out_as_v1_and_free_zeros_as_v2(
    run: Path, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    made = lowbit.export(run, "gptq", out=tmp_path / "sym")
    assert json.loads((made.out / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq"
    free = run_of("w2a16g16-asym")
    v2 = lowbit.export(free, "gptq", out=tmp_path / "free")
    assert json.loads((v2.out / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert not v2.warnings
    assert "zero points of 0" in lowbit.export(free, "gptq", out=tmp_path / "v1", gptq_format="v1").warnings[0]
    with pytest.raises(LowbitError, match="--gptq-format v3 given"):
        lowbit.export(run, "gptq", out=tmp_path / "x", gptq_format="v3")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales", "g_idx"])
def test_one_wrong_byte_is_named(run: Path, tmp_path: Path, key: str) -> None:
    made = lowbit.export(run, "gptq", out=tmp_path / "m")
    spoil(made.out / "block-00001.safetensors", f"model.layers.1.mlp.up_proj.{key}")
    (found,) = lowbit.verify(run, [made.out])
    assert "model.layers.1.mlp.up_proj" in " ".join([*found.differs, found.unreadable or ""])
    assert len(found.differs) <= 1
    assert call(["verify", str(run), str(made.out)]) == 1


def test_a_wrong_config_or_tokenizer_is_named(run: Path, tmp_path: Path) -> None:
    made = lowbit.export(run, "gptq", out=tmp_path / "m")
    for name in ("config.json", "tokenizer.json"):
        path = made.out / name
        content = path.read_bytes()
        path.write_bytes(
            content.replace(b"</s>", b"</t>").replace(b'"num_hidden_layers": 3', b'"num_hidden_layers": 2')
        )
        assert lowbit.verify(run, [made.out])[0].other == [name]
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("scheme", "overrides", "message"),
    [
        ("w4a4", {}, r"act: .*nearest that fits: w4a16-asym$"),
        ("w5a16-sym", {}, r"weight: .*5 bits.*nearest that fits: w4a16-sym$"),
        ("w4a16-sym", {"model.embed_tokens": "w8"}, r"override model.embed_tokens: .*'model.embed_tokens=float'$"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    refusal_of: Callable[..., str], scheme: str, overrides: dict[str, str], message: str
) -> None:
    assert re.search(message, refusal_of("gptq", scheme, overrides=overrides))
