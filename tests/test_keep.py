"""``--keep``: the codes of a quantized source become a run folder, and from there any export, with equal values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.exporters.run import Run, open_run
from lowbit.exporters.target import value_of
from lowbit.pipeline import keep
from lowbit.runs.manifest import manifest_of
from quantized_sources import (
    AWQ_CONFIG,
    FP8_CONFIG,
    MXFP4_CONFIG,
    awq,
    compressed,
    compressed_config,
    floats,
    fp8,
    gptq,
    gptq_config,
    ints,
    mxfp4,
    save_quantized,
)
from runs import folder_bytes, quantize_tiny
from tiny import save_tiny

# Name; how linears are packed; the config; the scheme of the run; what it exports to.
PACKED = ints(4, 32, True)
ASYMMETRIC = ints(4, 32, False)
ROWS = ints(8, None, True)
NVFP4 = floats(4, "tensor_group", 16, scale_dtype="torch.float8_e4m3fn")
MXFP8 = floats(8, "group", 32, scale_dtype="torch.uint8")
TENSOR = floats(8, "tensor")
PARTIAL = "fp8 in partial tiles"
SIZES = {PARTIAL: {"hidden_size": 192, "head_dim": 48, "num_key_value_heads": 4}}
KEPT: dict[str, tuple[Any, dict[str, Any], str, tuple[str, ...]]] = {
    "gptq": (gptq(), gptq_config(), "w4a16g32-sym", ("gguf", "onnx")),
    "gptq 3 bits": (gptq(3), gptq_config(3), "w3a16g32-sym", ("gguf",)),
    "gptq 2 bits asymmetric": (gptq(2, symmetric=False), gptq_config(2), "w2a16g32-asym", ("gguf", "onnx")),
    "awq": (awq, AWQ_CONFIG, "w4a16g32-asym", ("gguf", "onnx")),
    "mxfp4": (mxfp4, MXFP4_CONFIG, "mxfp4a16", ("gguf", "onnx")),
    "fp8": (fp8, FP8_CONFIG, "fp8-blocka16:f32", ("gguf", "onnx")),
    PARTIAL: (fp8, FP8_CONFIG, "fp8-blocka16:f32", ("gguf", "onnx")),
    "fp8 tensor": (
        compressed("float-quantized", TENSOR),
        compressed_config("float-quantized", TENSOR),
        "fp8-tensora16:f32",
        ("gguf", "onnx"),
    ),
    "packed": (
        compressed("pack-quantized", PACKED, torch.bfloat16),
        compressed_config("pack-quantized", PACKED),
        "w4a16g32-sym",
        ("gguf", "onnx"),
    ),
    "packed asymmetric": (
        compressed("pack-quantized", ASYMMETRIC, torch.float16),
        compressed_config("pack-quantized", ASYMMETRIC),
        "w4a16g32-asym",
        ("gguf",),
    ),
    "int8 of rows": (
        compressed("int-quantized", ROWS, torch.bfloat16),
        compressed_config("int-quantized", ROWS),
        "w8a16-sym",
        ("gguf",),
    ),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", NVFP4, power_of_two=True),
        compressed_config("nvfp4-pack-quantized", NVFP4),
        "nvfp4a16",
        ("gguf", "onnx"),
    ),
    "mxfp8": (
        compressed("mxfp8-quantized", MXFP8),
        compressed_config("mxfp8-quantized", MXFP8),
        "mxfp8a16",
        ("gguf", "onnx"),
    ),
}


def values_in(run: Run) -> set[str]:
    """Names of a run's parameters."""
    return {*run.floats, *(f"{module}.weight" for module in run.quantized)}


def check_values(folder: Path, values: dict[str, torch.Tensor]) -> None:
    """Every parameter of a run has the source's value."""
    run = open_run(folder)
    assert values_in(run) == values.keys()
    for name in values:
        assert torch.equal(value_of(run, name), values[name].float()), name


@pytest.mark.heavy
@pytest.mark.parametrize("name", KEPT)
def test_a_source_goes_through_a_run_to_its_exports_with_equal_values(name: str, tmp_path: Path) -> None:
    pack, config, scheme, targets = KEPT[name]
    values = save_quantized(tmp_path / "m", pack, config, **SIZES.get(name, {}))
    made = lowbit.quantize(tmp_path / "m", tmp_path / "run", keep=True)
    identity = made.manifest.identity
    assert (identity.scheme["scheme"], identity.recipe_name, identity.steps) == (scheme, "keep", ["keep"])
    assert (identity.data.corpus, identity.data.samples) == ("none", 0)
    check_values(made.out, values)
    for target in targets:
        out = lowbit.export(made.out, target, pre="gpt-2" if target == "gguf" else None).out
        # Values alone: llama.cpp, where it is installed, does not load this tokenizer.
        (result,) = lowbit.verify(made.out, [out], logits=False)
        assert result.ok, result


@pytest.mark.heavy
@pytest.mark.parametrize("name", KEPT)
def test_stock_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    pack, config, _, _ = KEPT[name]
    save_quantized(tmp_path / "m", pack, config, **SIZES.get(name, {}))
    made = lowbit.quantize(tmp_path / "m", tmp_path / "run", keep=True)
    assert made.manifest.transformers.loads
    (result,) = lowbit.verify(made.out)
    assert result.ok, result


def save_run(folder: Path, scheme: str, overrides: dict[str, str] | None = None) -> Path:
    """A run of a tiny Llama of three layers."""
    save_tiny(folder / "m", "llama")
    return quantize_tiny(folder / "m", folder / "run", scheme, overrides=overrides or {}).out


def quantized_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run folder."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file) if "observed" not in file.name else {}
    return out


@pytest.mark.parametrize(
    ("target", "scheme", "overrides"),
    [
        ("gptq", "w4a16g32-sym", {"*.down_proj": "w8g32"}),
        ("gptq", "w3a16g32-asym", {"model.layers.1.mlp.*": "float"}),
        ("awq", "w4a16g32-asym", {}),
        ("vllm", "w4a16g32-asym", {"*.down_proj": "w8g32"}),
        ("vllm", "w8a8-sym", {}),
    ],
)
def test_an_export_becomes_the_run_that_it_was_made_of(
    target: str, scheme: str, overrides: dict[str, str], tmp_path: Path
) -> None:
    run = save_run(tmp_path, scheme, overrides)
    exported = lowbit.export(run, target).out
    kept = lowbit.quantize(exported, tmp_path / "kept", keep=True)
    ours, theirs = quantized_tensors(kept.out), quantized_tensors(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    old = manifest_of(run)
    assert old is not None
    assert (kept.manifest.quantized, kept.manifest.floats) == (old.quantized, old.floats)
    assert kept.bits_per_weight == old.bits_per_weight
    notes = kept.manifest.blocks[0].notes
    assert notes == (["keep: inputs of linears, as the source has it, is float here"] if "a8" in scheme else [])


@pytest.mark.parametrize("scheme", ["w4a16g32-asym", "q4_k", "iq4_nl", "q2_0", "mxfp6a16"])
def test_a_run_folder_without_its_manifest_is_read_like_any_other(scheme: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=64)
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", scheme).out
    expected = {name: value_of(opened, name) for opened in [open_run(run)] for name in values_in(opened)}
    (run / "lowbit.json").unlink()
    kept = lowbit.quantize(run, tmp_path / "kept", keep=True)
    check_values(kept.out, expected)
    ours, theirs = quantized_tensors(kept.out), quantized_tensors(run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_operations_at_run_time_need_the_manifest(tmp_path: Path) -> None:
    run = save_run(tmp_path, "w4a16g32-sym")
    stored = load_file(run / "block-00001.safetensors")
    stored["model.layers.1.input_layernorm.runtime.gather.factor"] = torch.ones(64)
    save_file(stored, run / "block-00001.safetensors", metadata={"format": "pt"})
    (run / "lowbit.json").unlink()
    with pytest.raises(
        LowbitError, match=r"operations at run time \(.*gather.*\) that only its lowbit.json describes"
    ):
        lowbit.load(run)


def test_a_run_is_resumed_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = lowbit.export(save_run(tmp_path, "w4a16g32-sym"), "gptq").out
    whole = lowbit.quantize(exported, tmp_path / "whole", keep=True)
    write = keep.write_tensors

    def dying(path: Path, tensors: Any) -> None:
        if path.name == "block-00001.safetensors":
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(keep, "write_tensors", dying)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(exported, tmp_path / "cut", keep=True)
    assert (tmp_path / "cut/block-00000.safetensors").exists()
    assert not (tmp_path / "cut/lowbit.json").exists()
    monkeypatch.undo()
    lowbit.quantize(exported, tmp_path / "cut", keep=True)
    assert folder_bytes(tmp_path / "cut") == folder_bytes(whole.out)
    capsys.readouterr()
    lowbit.quantize(exported, tmp_path / "cut", keep=True)
    assert "already holds this run" in capsys.readouterr().err
    assert folder_bytes(tmp_path / "cut") == folder_bytes(whole.out)


def test_quantized_head_and_embedding(tmp_path: Path) -> None:
    values = save_quantized(tmp_path / "m", gptq(), gptq_config(), head=True)
    made = lowbit.quantize(tmp_path / "m", tmp_path / "run", keep=True)
    assert made.manifest.identity.scheme["overrides"] == [{"lm_head": "w4g32-sym"}]
    check_values(made.out, values)


def test_a_tied_head_keeps_the_embeddings_codes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", "llama", tie_word_embeddings=True)
    over = {"model.embed_tokens": "w8g32"}
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", "w4a16g32-sym", overrides=over).out
    expected = {name: value_of(opened, name) for opened in [open_run(run)] for name in values_in(opened)}
    (run / "lowbit.json").unlink()
    check_values(lowbit.quantize(run, tmp_path / "kept", keep=True).out, expected)


def test_scales_that_only_float32_holds_stay_exact(tmp_path: Path) -> None:
    values = save_quantized(tmp_path / "m", compressed("pack-quantized", PACKED), KEPT["packed"][1])
    made = lowbit.quantize(tmp_path / "m", tmp_path / "run", keep=True)
    assert made.manifest.identity.scheme["scheme"] == "w4a16g32-sym:f32"
    check_values(made.out, values)
    with pytest.raises(LowbitError, match="float16"):
        lowbit.export(made.out, "gguf", pre="gpt-2")


def fp8_in_half_tiles(weight: torch.Tensor, generator: torch.Generator) -> Any:
    """Tiles of 64 x 128: those of 128 x 128, said twice."""
    packed, value = fp8(weight, generator)
    rows = -(-weight.shape[0] // 64)
    return {**packed, "weight_scale_inv": packed["weight_scale_inv"].repeat_interleave(2, 0)[:rows]}, value


REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "activation order": (gptq(order=True), gptq_config(desc_act=True), {}, "groups are in activation order"),
    "tiles": (
        fp8_in_half_tiles,
        {**FP8_CONFIG, "weight_block_size": [64, 128]},
        {"hidden_size": 128},
        "no format has tiles of 64",
    ),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", NVFP4),
        compressed_config("nvfp4-pack-quantized", NVFP4),
        {},
        "its tensor's scale is no power of two",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_format_holds_is_refused_and_can_be_quantized_anew(name: str, tmp_path: Path) -> None:
    pack, config, sizes, why = REFUSED[name]
    save_quantized(tmp_path / "m", pack, config, **sizes)
    with pytest.raises(LowbitError, match=f"--keep: no format holds 'model.*{why}.*leave out --keep, and the source"):
        lowbit.quantize(tmp_path / "m", tmp_path / "run", keep=True)
    assert not (tmp_path / "run").exists()
    assert quantize_tiny(tmp_path / "m", tmp_path / "run", "w4a16g16-sym").manifest.identity.recipe_name == "rtn"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--scheme", "w4a16"], "--scheme"),
        (["--recipe", "rtn"], "--recipe"),
        (["--data", "builtin"], "--data"),
        (["--target", "vllm"], "--target"),
        (["--override", "lm_head=w8"], "--override"),
        (["--seed", "1"], "--seed"),
        (["--dtype", "bfloat16"], "--dtype"),
    ],
)
def test_options_without_an_effect_are_refused(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["quantize", str(tmp_path), "--out", str(tmp_path / "run"), "--keep", *options]) == 2
    assert f"--keep and {named} given" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_float_models_and_runs_have_nothing_to_keep(tmp_path: Path) -> None:
    run = save_run(tmp_path, "w4a16g32-sym")
    for model, message in ((tmp_path / "m", "are float: leave it out"), (run, "is a run folder.*'export'")):
        with pytest.raises(LowbitError, match=message):
            lowbit.quantize(model, tmp_path / "kept", keep=True)
        assert not (tmp_path / "kept").exists()


def test_commands_on_such_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run, page = (str(tmp_path / name) for name in ("m", "run", "page.html"))
    save_quantized(tmp_path / "m", gptq(), gptq_config())
    text = str(tmp_path / "m/calib.txt")
    assert call(["quantize", source, "--out", run, "--keep", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_weight"] == 4.5
    assert call(["evaluate", run, "--data", text, "--length", "16", "--tokens", "64"]) == 0
    assert call(["inspect", run]) == 0
    assert call(["report", run, "--out", page]) == 0
    content = Path(page).read_text()
    assert "the source's codes" in content or "the source&#39;s codes" in content
    assert "lowbit quantize m --out DIR --keep" in content
    card = (tmp_path / "run/README.md").read_text()
    assert "| calibration | none: codes, scales and zero points are the source's |" in card
    capsys.readouterr()
    assert call(["inspect", run, "--float", "1"]) == 2
    assert "keeps its source's codes, so nothing was measured" in capsys.readouterr().err
