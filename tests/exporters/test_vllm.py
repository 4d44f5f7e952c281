"""The repack for vLLM holds the run's own codes and qparams, as compressed-tensors decompresses it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import lowbit
from lowbit.errors import LowbitError
from lowbit.models.fixed_hadamard import FixedHadamard
from runs import quantize_tiny
from tiny import save_tiny, spoil, tiny_ids


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        ("w4a4g32-sym", "pack-quantized"), ("w3a8-sym", "pack-quantized"), ("w8a8g32-sym", "pack-quantized"),
        ("w4a16g32-asym", "pack-quantized"), ("w3a16g32-sym", "pack-quantized"), ("w8a8-sym", "int-quantized"),
    ],
)  # fmt: skip
def test_it_reads_back_bit_for_bit_in_the_layout_that_vllm_runs(
    run_of: Callable[..., Path], tmp_path: Path, scheme: str, layout: str
) -> None:
    run = run_of(scheme)
    made = lowbit.export(run, "vllm", out=tmp_path / "vllm")
    (found,) = lowbit.verify(run, [made.out])
    assert found.ok
    assert found.target == "vllm"
    assert found.exact == found.tensors > 20
    config = settings(made.out)
    assert config["format"] == layout
    assert "dequantize" not in config
    group = config["config_groups"]["group_0"]
    if "a16" in scheme:
        assert group["input_activations"] is None
    else:
        assert group["input_activations"] == {
            "num_bits": int(scheme[3]), "type": "int", "symmetric": True, "strategy": "token", "dynamic": True
        }  # fmt: skip
    assert group["weights"]["num_bits"] == int(scheme[1])
    with safe_open(made.out / "block-00000.safetensors", framework="pt") as shard:
        assert shard.get_tensor("model.layers.0.mlp.up_proj.weight_scale").dtype == torch.float16


@pytest.mark.parametrize("target", ["vllm", "gptq", "awq"])
def test_scales_that_the_requested_dtype_rounds_are_said(target: str, tmp_path: Path) -> None:
    """vLLM reads scales in the config's dtype: float16, or for Gemma the run's own, here bfloat16."""
    save_tiny(tmp_path / "gemma", "gemma2", dtype="bfloat16")
    content = json.loads((tmp_path / "gemma/config.json").read_text())
    (tmp_path / "gemma/config.json").write_text(json.dumps({**content, "dtype": "bfloat16"}))
    run = quantize_tiny(tmp_path / "gemma", tmp_path / "run", "w4a16g32-sym").out
    (line,) = lowbit.export(run, target).warnings
    found = re.fullmatch(
        r"the folder is loaded in bfloat16: scales of 21 of 21 linears are rounded, by (0\.\d+)% at most; codes are "
        "unchanged",
        line,
    )
    assert found is not None
    assert 0.2 < float(found[1]) <= 0.4  # half of bfloat16's 2**-8, which is 0.39 %, relative to 1, or less


def test_float32_scales_are_not_written_without_a_word(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("w4a16g32-sym:f32")
    (line,) = lowbit.export(run, "vllm", out=tmp_path / "vllm").warnings
    assert "loaded in float16: scales of 21 of 21 linears are rounded, by 0.05% at most" in line
    assert lowbit.export(run_of("w4a16g32-sym"), "vllm", out=tmp_path / "exact").warnings == []


def test_codes_take_their_own_width_on_disk(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("w4a4g32-sym")
    made = lowbit.export(run, "vllm", out=tmp_path / "vllm")
    with safe_open(made.out / "block-00000.safetensors", framework="pt") as shard:
        assert shard.get_slice("model.layers.0.mlp.up_proj.weight_packed").get_shape() == [96, 64 * 4 // 32]


def test_groups_of_formats_are_told_apart(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("w4a4g32-sym", overrides={"*.down_proj": "w8g32", "*.1.self_attn.o_proj": "float"})
    assert lowbit.verify(run, [lowbit.export(run, "vllm", out=tmp_path / "vllm").out])[0].ok


@pytest.mark.parametrize("key", ["weight_packed", "weight_scale", "weight_shape"])
def test_one_wrong_byte_is_named(run_of: Callable[..., Path], tmp_path: Path, key: str) -> None:
    run = run_of("w4a8g32-sym")
    made = lowbit.export(run, "vllm", out=tmp_path / "vllm")
    spoil(made.out / "block-00001.safetensors", f"model.layers.1.mlp.up_proj.{key}")
    (found,) = lowbit.verify(run, [made.out])
    assert "model.layers.1.mlp.up_proj" in " ".join([*found.differs, found.unreadable or ""])


@pytest.mark.parametrize(
    ("scheme", "overrides", "message"),
    [
        ("w4a4-asym", {}, r"act: .*symmetrically; nearest that fits: w4a4-sym$"),
        ("w6a6-sym", {}, r"act: .*6 bits.*nearest that fits: w6a8-sym$"),
        ("w4a16kv4", {}, r"kv: .*nearest that fits: w4a16-sym$"),
        ("w3a16-asym", {}, r"weight: .*asymmetric at 3 bits.*nearest that fits: w3a16-sym$"),
        ("mxfp4", {}, r"layout: mxfp4 with inputs in mxfp4 needs no export: vLLM reads the run folder itself$"),
        ("w4afp8", {}, r"weight: .*no kernel for w4-sym with inputs in fp8; it has .*w4g128-sym with fp8"),
        ("mxfp6a8", {}, r"weight: .*no kernel for mxfp6 with inputs in mxfp8; it has fp8 with float, "),
        ("w4a4-sym", {"*.q_proj": "w8"}, r"q_proj: vLLM fuses it with .*k_proj.*'\*\.q_proj=w4-sym'$"),
        ("w4a4-sym", {"*.1.mlp.up_proj": "float"}, r"1\.mlp\.up_proj: vLLM fuses it.*=w4-sym'$"),
    ],
)
def test_what_does_not_fit_is_refused(
    refusal_of: Callable[..., str], scheme: str, overrides: dict[str, str], message: str
) -> None:
    assert re.search(message, refusal_of("vllm", scheme, overrides=overrides))


def test_a_run_folder_is_no_export_of_itself(run_of: Callable[..., Path]) -> None:
    run = run_of("w4a16g32-sym")
    with pytest.raises(LowbitError, match="not an export in a known format"):
        lowbit.verify(run, [run])


def transformed_logits(made: Path, run: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of stock ``transformers`` with the run's weights and the export's transforms, by its own library."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowbit.exporters.run import open_run
    from lowbit.exporters.target import value_of

    config = AutoConfig.from_pretrained(made)
    del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config).eval()
    opened = open_run(run)
    names = [*opened.floats, *(f"{module}.weight" for module in opened.quantized)]
    model.load_state_dict({name: value_of(opened, name) for name in names}, strict=False)
    apply_transform_config(model, TransformConfig.model_validate(settings(made)["transform_config"]))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("block", "sizes"), [("whole", {"64": 64, "32": 32}), ("16", {"16": 16})])
def test_hadamard_transforms_are_those_that_compressed_tensors_applies(
    run_of: Callable[..., Path], tmp_path: Path, block: str, sizes: dict[str, int]
) -> None:
    given = ("hadamard.signs=false", f"hadamard.block={block}")
    run = run_of("w4a16g32-sym", recipe="hadamard", settings=given)
    made = lowbit.export(run, "vllm", out=tmp_path / "vllm").out
    groups = settings(made)["transform_config"]["config_groups"]
    assert {name: group["head_dim"] for name, group in groups.items()} == {
        f"hadamard_{name}": size for name, size in sizes.items()
    }
    targets = [name for group in groups.values() for name in group["apply"][0]["targets"]]
    assert len(targets) == len(set(targets)) == 3 * 7  # every linear of three layers, once
    (found,) = lowbit.verify(run, [made])
    assert found.ok
    assert found.exact == found.tensors
    ids = tiny_ids(2)
    with torch.no_grad():
        wanted = lowbit.load(run)(ids).logits
        got = transformed_logits(made, run, ids)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("size", [8, 64])
def test_the_op_is_the_librarys_transform_in_float64(size: int) -> None:
    from compressed_tensors.transform import TransformArgs, TransformFactory, TransformScheme

    args = TransformArgs(targets=["Linear"], location="input")
    scheme = TransformScheme(type="hadamard", apply=[args], head_dim=size, precision=torch.float64)
    linear = torch.nn.Linear(64, 3, bias=False, dtype=torch.float64)
    transform = TransformFactory.from_scheme(scheme, name="h").create_transform(linear, args)
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(transform(x), FixedHadamard.of(64, size)(x), rtol=1e-13, atol=1e-13)


def test_a_changed_transform_is_seen(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of("w4a16g32-sym", recipe="hadamard", settings=("hadamard.signs=false",))
    made = lowbit.export(run, "vllm", out=tmp_path / "vllm").out
    config = json.loads((made / "config.json").read_text())
    group = config["quantization_config"]["transform_config"]["config_groups"]["hadamard_32"]
    group["apply"][0]["targets"].remove("model.layers.1.mlp.down_proj")
    (made / "config.json").write_text(json.dumps(config))
    (found,) = lowbit.verify(run, [made])
    assert found.differs == ["model.layers.1.mlp.down_proj.input.runtime.fixed-hadamard.sizes"]
    assert found.other == ["config.json"]


@pytest.mark.parametrize(
    ("family", "scheme", "given", "message"),
    [
        ("llama", "w4a16g32-sym", (), r"leaves Hadamard transforms at run time; .*hadamard\.signs=false"),
        ("qwen2", "w4a16g32-sym", ("hadamard.signs=false",), r"q_proj has a bias, which vLLM refuses behind a"),
        ("llama", "nvfp4", ("hadamard.signs=false",), "transforms are written with integer weights only"),
    ],
)
def test_transforms_that_it_does_not_run_are_refused_before_work(
    tmp_path: Path, family: str, scheme: str, given: tuple[str, ...], message: str
) -> None:
    save_tiny(tmp_path / "m", family)
    with pytest.raises(LowbitError, match=message) as caught:
        quantize_tiny(tmp_path / "m", tmp_path / "out", scheme, "hadamard", settings=given, target="vllm")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
