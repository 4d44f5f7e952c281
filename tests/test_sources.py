"""Sources that are quantized already: every value decoded, as the layout defines it or its library decodes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lowbit
from lowbit.checkpoints.resolve import load_config
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.pipeline.inspect import inspect_model
from lowbit.quant.format import QTensor
from lowbit.sources.checkpoint import QuantizedCheckpoint, open_checkpoint
from lowbit.sources.layout import FloatOnly
from lowbit.sources.layouts import layout_of
from quantized_sources import (
    AUTO_FP8_CONFIG,
    AWQ_CONFIG,
    FP8_CONFIG,
    MXFP4_CONFIG,
    SIZES,
    auto_fp8,
    awq,
    compressed,
    compressed_config,
    draw,
    edit,
    floats,
    fp8,
    gptq,
    gptq_config,
    ints,
    mxfp4,
    save_quantized,
)
from runs import quantize_tiny, streamed_logits
from tiny import save_tiny, tiny_ids

IDS = tiny_ids(1, 12)
NARROW = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
# Name; how linears are packed; the config; sizes.
SOURCES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gptq": (gptq(), gptq_config(), {}),
    "gptq 3 bits": (gptq(3), gptq_config(3), {}),
    "gptq 8 bits asymmetric": (gptq(8, symmetric=False), gptq_config(8), {}),
    "gptq v2": (gptq(symmetric=False, v2=True), gptq_config(v2=True), {}),
    "gptq activation order": (gptq(order=True), gptq_config(desc_act=True), {}),
    "awq": (awq, AWQ_CONFIG, {}),
    "fp8": (fp8, FP8_CONFIG, {}),
    "fp8 with partial tiles": (fp8, FP8_CONFIG, NARROW),
    "fp8 of AutoFP8": (auto_fp8, AUTO_FP8_CONFIG, {}),
    "mxfp4": (mxfp4, MXFP4_CONFIG, {}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_value_is_the_one_that_the_layout_defines(name: str, tmp_path: Path) -> None:
    pack, config, sizes = SOURCES[name]
    values = save_quantized(tmp_path / "m", pack, config, **sizes)
    checkpoint = open_checkpoint(tmp_path / "m", load_config(tmp_path / "m"))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert checkpoint.names == sorted(values)
    assert len(checkpoint.quantized) == 7
    for key, value in checkpoint.read(checkpoint.names).items():
        assert torch.equal(value, values[key]), key
        assert checkpoint.shape(key) == tuple(value.shape)


def test_all_commands_read_such_a_folder_as_the_float_model(tmp_path: Path) -> None:
    values = save_quantized(tmp_path / "m", gptq(), gptq_config())
    model = save_tiny(tmp_path / "float", "llama", **SIZES)
    model.load_state_dict(values)
    model.save_pretrained(tmp_path / "float")
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.allclose(lowbit.load(tmp_path / "m")(IDS).logits, expected, atol=1e-5)
    assert torch.allclose(streamed_logits(tmp_path / "m", IDS), expected, atol=1e-5)
    ours = quantize_tiny(tmp_path / "m", tmp_path / "run", "w8a16g32-sym")
    theirs = quantize_tiny(tmp_path / "float", tmp_path / "float-run", "w8a16g32-sym")
    shards = [load_file(run.out / "block-00000.safetensors") for run in (ours, theirs)]
    assert shards[0].keys() == shards[1].keys()
    assert all(torch.equal(shards[0][key], shards[1][key]) for key in shards[0])
    config = json.loads((ours.out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    facts = inspect_model(str(tmp_path / "m"), "w4a16", "rtn", length=16)
    assert facts["quantized"] == "GPTQ, 4 bits, groups of 32"
    assert "quantized" not in inspect_model(str(tmp_path / "float"), "w4a16", "rtn", length=16)


def test_the_identity_is_that_of_the_bytes(tmp_path: Path) -> None:
    save_quantized(tmp_path / "m", gptq(), gptq_config())
    from lowbit.checkpoints.identity import fingerprint

    before = fingerprint(tmp_path / "m")
    edit(tmp_path / "m", lambda tensors: tensors["model.layers.0.mlp.up_proj.qzeros"].add_(1))
    assert fingerprint(tmp_path / "m") != before


@pytest.mark.parametrize("tiles", [None, [128, 128], [1, 32]])
def test_fp8_is_what_transformers_dequantizes(tiles: list[int] | None, tmp_path: Path) -> None:
    """The library writes its folder itself, except for MX, whose scales are bytes."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    class Quantizer:
        quantization_config = FineGrainedFP8Config(
            weight_block_size=tiles, scale_fmt="ue8m0" if tiles == [1, 32] else "float"
        )

    expected = {}

    def pack(weight: torch.Tensor, generator: torch.Generator) -> Any:
        made = Fp8Quantize(Quantizer()).convert({"m.weight": weight})
        scale = made["m.weight_scale_inv"]
        value = Fp8Dequantize(Quantizer())._dequantize_one(made["m.weight"], scale, torch.float32)
        scale = scale.view(torch.uint8) if tiles == [1, 32] else scale
        return {"weight": made["m.weight"], "weight_scale_inv": scale}, value

    method = "mxfp8" if tiles == [1, 32] else "fp8"
    expected = save_quantized(tmp_path / "m", pack, {"quant_method": method, "weight_block_size": tiles})
    checkpoint = open_checkpoint(tmp_path / "m", load_config(tmp_path / "m"))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert all(torch.equal(value, expected[key]) for key, value in checkpoint.read(checkpoint.names).items())
    decoded = checkpoint.codes("model.layers.0.mlp.up_proj.weight")
    assert isinstance(decoded, QTensor)
    name = decoded.format.name
    assert name == {None: "fp8-tensor", 128: "fp8-block", 1: "mxfp8"}[tiles and tiles[0]]


def test_experts_in_mxfp4_are_what_transformers_dequantizes() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = draw(generator, 256, 3, 8, 2, 16).to(torch.uint8)
    scales = draw(generator, 9, 3, 8, 2).to(torch.uint8) + 120
    layout = layout_of(MXFP4_CONFIG, "c")
    from lowbit.checkpoints.stored import Header

    headers = {"e.down_proj_blocks": Header((3, 8, 2, 16), "U8"), "e.down_proj_scales": Header((3, 8, 2), "U8")}
    (weight,) = layout.weights(headers, lambda names: {})
    assert weight.name == "e.down_proj"
    assert weight.shape == (3, 64, 8)
    found = layout.unpack(weight, {"_blocks": blocks, "_scales": scales})
    assert isinstance(found, FloatOnly)
    assert torch.equal(found.value, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


COMPRESSED: list[tuple[str, dict[str, Any], str | None]] = [
    ("pack-quantized", ints(4, 32, True), "w4g32-sym"),
    ("pack-quantized", ints(3, 32, True), "w3g32-sym"),
    ("pack-quantized", ints(4, 32, False), "w4g32-asym"),
    ("pack-quantized", ints(8, None, True), "w8-sym"),
    ("int-quantized", ints(8, None, True), "w8-sym"),
    ("int-quantized", ints(4, 32, False), "w4g32-asym"),
    ("naive-quantized", ints(8, 64, False), "w8g64-asym"),
    ("float-quantized", floats(8, "channel"), "fp8"),
    ("float-quantized", floats(8, "tensor"), "fp8-tensor"),
    ("float-quantized", floats(8, "block", block_structure=[128, 128]), "fp8-block"),
    ("naive-quantized", floats(8, "channel"), "fp8"),
    ("nvfp4-pack-quantized", floats(4, "tensor_group", 16, scale_dtype="torch.float8_e4m3fn"), None),
    ("mxfp4-pack-quantized", floats(4, "group", 32, scale_dtype="torch.uint8"), "mxfp4"),
    ("mxfp8-quantized", floats(8, "group", 32, scale_dtype="torch.uint8"), "mxfp8"),
]


@pytest.mark.parametrize(("format", "args", "name"), COMPRESSED, ids=lambda x: x if isinstance(x, str) else None)
def test_compressed_tensors_are_what_the_library_decompresses(
    format: str, args: dict[str, Any], name: str | None, tmp_path: Path
) -> None:
    values = save_quantized(tmp_path / "m", compressed(format, args), compressed_config(format, args))
    checkpoint = open_checkpoint(tmp_path / "m", load_config(tmp_path / "m"))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    found = checkpoint.read(checkpoint.names)
    assert found.keys() == values.keys()
    for key, value in found.items():
        assert torch.equal(value, values[key]), (key, (value - values[key]).abs().max())
    decoded = checkpoint.codes("model.layers.0.mlp.up_proj.weight")
    assert (decoded.format.name if isinstance(decoded, QTensor) else None) == name


UP = "model.layers.0.mlp.up_proj."
PACKED = compressed_config("pack-quantized", ints(4, 32, True))
NVFP4_ARGS = floats(4, "tensor_group", 16, scale_dtype="torch.float8_e4m3fn")
NVFP4 = compressed("nvfp4-pack-quantized", NVFP4_ARGS), compressed_config("nvfp4-pack-quantized", NVFP4_ARGS)


def gone(name: str) -> Any:
    return lambda tensors: tensors.pop(UP + name)


def put(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({UP + name: value})


def cut(name: str) -> Any:
    return lambda tensors: tensors.update({UP + name: tensors[UP + name][:-1]})


def first(name: str, value: float) -> Any:
    return lambda tensors: tensors[UP + name].view(-1)[:1].fill_(value)


# Name; how linears are packed; the config; the damage; what the line says.
DAMAGE: list[tuple[str, Any, dict[str, Any], Any, str]] = [
    ("gptq without zeros", gptq(), gptq_config(), gone("qzeros"), r"up_proj.qzeros' is missing"),
    ("gptq with few scales", gptq(), gptq_config(), cut("scales"), r"scales is float16 \[7, 256\], allowed is .*\[8"),
    ("gptq with few codes", gptq(), gptq_config(), cut("qweight"), r"shape \(256, 248\), config.json implies"),
    ("gptq with few zeros", gptq(), gptq_config(), cut("qzeros"), r"qzeros is int32 \[7, 32\]"),
    ("gptq of floats", gptq(), gptq_config(), put("qweight", torch.ones(32, 256)), "qweight is float32"),
    ("gptq with a vector", gptq(), gptq_config(), put("qweight", torch.ones(8)), r"the shape \[8\], allowed are two"),
    ("gptq with a wild group", gptq(), gptq_config(), first("g_idx", 8), "names groups 0 to 8, there are 8"),
    ("gptq with NaN", gptq(), gptq_config(), first("scales", float("nan")), "NaN or infini"),
    ("gptq of other bits", gptq(), gptq_config(8), lambda tensors: None, r"\(256, 128\), config.json implies"),
    ("gptq beside floats", gptq(), gptq_config(), put("weight", torch.ones(256, 256)), "as codes and as floats"),
    ("gptq with more", gptq(), gptq_config(), put("lora", torch.ones(2)), "up_proj.lora' beside quantized weights"),
    ("awq without scales", awq, AWQ_CONFIG, gone("scales"), r"up_proj.scales' is missing"),
    ("awq with few zeros", awq, AWQ_CONFIG, cut("qzeros"), r"qzeros is int32 \[7, 32\]"),
    ("fp8 without codes", fp8, FP8_CONFIG, gone("weight"), r"up_proj.weight' is missing"),
    ("fp8 without scales", fp8, FP8_CONFIG, gone("weight_scale_inv"), "is F8_E4M3; allowed: F16"),
    ("fp8 with few scales", fp8, FP8_CONFIG, cut("weight_scale_inv"), r"\[1, 2\], allowed is .*\[2, 2\]"),
    ("fp8 of AutoFP8 with scales", auto_fp8, AUTO_FP8_CONFIG, put("weight_scale", torch.ones(2, 2)), r"\[2, 2\]"),
    ("fp8 of floats", fp8, FP8_CONFIG, put("weight", torch.ones(256, 256)), "is float32 .*allowed is float8_e4m3fn"),
    ("mxfp4 without scales", mxfp4, MXFP4_CONFIG, gone("weight_scales"), r"weight_scales' is missing"),
    ("mxfp4 with NaN", mxfp4, MXFP4_CONFIG, first("weight_scales", 255), r"a scale is NaN \(byte 255\)"),
    ("mxfp4 of a matrix", mxfp4, MXFP4_CONFIG, put("weight_blocks", torch.ones(256, 128)), r"\[out, in / 32, 16\]"),
    (
        "packed without scales",
        compressed("pack-quantized", ints(4, 32, True)),
        PACKED,
        gone("weight_scale"),
        "missing",
    ),
    ("packed with few codes", compressed("pack-quantized", ints(4, 32, True)), PACKED, cut("weight_packed"), "says"),
    (
        "packed of a wild shape",
        compressed("pack-quantized", ints(4, 32, True)),
        PACKED,
        put("weight_shape", torch.tensor([256, 2**40])),
        "says",
    ),
    ("nvfp4 without its tensor's scale", *NVFP4, gone("weight_global_scale"), "weight_global_scale' is missing"),
    ("nvfp4 over 0", *NVFP4, put("weight_global_scale", torch.zeros(1)), "allowed is a float32 above 0"),
]


@pytest.mark.parametrize("case", DAMAGE, ids=lambda case: case[0])
def test_damage_is_one_line(case: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, pack, config, damage, message = case
    save_quantized(tmp_path / "m", pack, config)
    edit(tmp_path / "m", damage)
    with pytest.raises(LowbitError, match=message) as caught:
        lowbit.load(tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    capsys.readouterr()
    assert call(["quantize", str(tmp_path / "m"), "--out", str(tmp_path / "run"), "--keep"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("lowbit: error: ")
    assert not (tmp_path / "run").exists()


def group_of(**changes: Any) -> dict[str, Any]:
    """A config of compressed-tensors whose only group is changed."""
    group = {**PACKED["config_groups"]["group_0"], **changes}
    return {**PACKED, "config_groups": {"group_0": group}}


CONFIGS: list[tuple[Any, str]] = [
    ("x", "is not a valid config"),
    ({}, "has no tensor 'model.layers.0.self_attn.q_proj.weight'"),
    ({"bits": 4}, r"already quantized \(None\)"),
    (
        {"quant_method": "bitsandbytes"},
        r"already quantized \('bitsandbytes'\); read are awq, compressed-tensors, fp8",
    ),
    (gptq_config(5), "bits = 5 in quantization_config; read are 2, 3, 4, 8"),
    ({**gptq_config(), "group_size": 0}, "group_size = 0"),
    ({**gptq_config(), "group_size": "x"}, "group_size = 'x'"),
    ({**gptq_config(), "checkpoint_format": "marlin"}, "the GPTQ format 'marlin'; read are gptq, gptq_v2"),
    ({**gptq_config(), "dynamic": {"+:(": {}}}, r"the pattern '\+:\(' under 'dynamic', which is none"),
    ({**AWQ_CONFIG, "version": "gemv"}, "AWQ codes in the order 'gemv'; read is gemm"),
    ({**AWQ_CONFIG, "bits": 8}, "bits = 8"),
    ({**FP8_CONFIG, "weight_block_size": [128]}, r"weight_block_size = \[128\]; allowed are rows and columns"),
    ({**PACKED, "config_groups": None}, "has no config_groups"),
    ({**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
    ({**PACKED, "transform_config": {"config_groups": {"R1": {}}}}, "transforms of inputs"),
    (group_of(format="marlin-24"), "the compressed-tensors format 'marlin-24'; read are pack-quantized"),
    (group_of(targets=["re:("]), "no regular expression"),
    (group_of(targets=None), "lacks targets or weights"),
    (group_of(weights=None), "lacks targets or weights"),
    (group_of(weights=ints(4, 32, True) | {"num_bits": 99}), "num_bits = 99"),
    (group_of(weights=ints(4, 32, True) | {"strategy": "head"}), "strategy 'head'"),
    (group_of(targets=["re:.*q_proj"]), "no config group names '.*', which has codes"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS, ids=lambda value: str(value)[:40])
def test_configs_that_are_not_read(config: Any, message: str, tmp_path: Path) -> None:
    pack = gptq() if not isinstance(config, dict) or "config_groups" not in config else None
    save_quantized(tmp_path / "m", pack or compressed("pack-quantized", ints(4, 32, True)), config)
    with pytest.raises(LowbitError, match=message) as caught:
        lowbit.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("config", "read"), [(PACKED, True), ("x", False)])
def test_the_former_name_of_the_config(config: Any, read: bool, tmp_path: Path) -> None:
    values = save_quantized(tmp_path / "m", compressed("pack-quantized", ints(4, 32, True)), None)
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "compression_config": config}))
    if read:
        state = lowbit.load(tmp_path / "m").state_dict()
        assert all(torch.equal(state[name], value) for name, value in values.items())
        return
    with pytest.raises(LowbitError, match="quantization_config = 'x', an object is allowed"):
        lowbit.load(tmp_path / "m")
