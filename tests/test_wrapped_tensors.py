"""Tensors that a model's class does not list, and names that differ between files and model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.copy_tensors import copy_tensors
from lowbit.checkpoints.resolve import load_config
from lowbit.models.validate import open_weights
from lowbit.pipeline.inspect import inspect_model
from runs import quantize_tiny, streamed_logits
from tiny import save_tiny, tiny_ids, tiny_tokenizer
from wrapped import save_wrapped

pytestmark = pytest.mark.heavy  # makes whole runs
UP = "model.layers.3.mlp.up_proj.weight"  # behind the last of three layers
UNLISTED = {
    UP: torch.full((4, 4), torch.nan),
    "mtp.fc.weight": torch.arange(6, dtype=torch.int16).view(2, 3),
    "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.bfloat16),
    "vision.patch.weight": torch.ones(3, dtype=torch.float8_e4m3fn),
}


def add(folder: Path, tensors: dict[str, torch.Tensor], **config) -> None:
    """Add tensors to a folder, and fields to its config."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))


def test_tensors_that_the_class_does_not_have_come_along(tmp_path: Path):
    save_tiny(tmp_path / "m", "llama")
    add(tmp_path / "m", UNLISTED, num_nextn_predict_layers=1)
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", "w8a16g32-sym").out
    carried = load_file(run / "model-carried.safetensors")
    assert carried.keys() == UNLISTED.keys()
    for name, value in UNLISTED.items():
        assert carried[name].dtype == value.dtype
        assert torch.equal(carried[name].view(torch.uint8), value.view(torch.uint8))
    note = json.loads((run / "lowbit.json").read_text())["carried"]
    assert len(note) == 1
    assert "4 tensors that the model's class does not have" in note[0]
    assert inspect_model(str(tmp_path / "m"), "w8a16g32-sym", "rtn")["carried_over"] == note[0]
    ids = tiny_ids(2, 12)
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)(ids).logits
    assert torch.allclose(stock, streamed_logits(run, ids), atol=1e-5)
    index = json.loads((run / "model.safetensors.index.json").read_text())["weight_map"]
    assert index[UP] == "model-carried.safetensors"
    lowbit.export(run, "gptq", out=tmp_path / "gptq")


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        *((target, "w4a16g32-sym") for target in ("gptq", "awq", "vllm", "onnx")),
        ("gguf", "w8a16g32-sym"),
    ],
)
def test_an_export_says_what_stays_behind(target: str, scheme: str, tmp_path: Path):
    """Also in the list of files: an empty one is none."""
    if target == "onnx":
        pytest.importorskip("onnxruntime_genai", reason="pip install 'lowbit[onnx]'")
    save_tiny(tmp_path / "m", "llama")
    if target == "gguf":
        tiny_tokenizer(merge=True).save_pretrained(tmp_path / "m")
    add(tmp_path / "m", UNLISTED, num_nextn_predict_layers=1)
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", scheme).out
    made = lowbit.export(run, target)
    assert made.warnings == [
        "4 tensors that the run carries over and the model's class does not have stay behind: "
        f"{UP.replace('3.mlp.up_proj.weight', '1.self_attn.rotary_emb.inv_freq')}, {UP}, mtp.fc.weight and 1 more"
    ]
    if target not in ("gguf", "onnx"):
        assert not (made.out / "model-carried.safetensors").exists()
        index = json.loads((made.out / "model.safetensors.index.json").read_text())["weight_map"]
        assert not index.keys() & UNLISTED.keys()
    (found,) = lowbit.verify(run, [made.out], logits=False)
    assert found.ok


def test_a_folder_for_stock_transformers_has_what_a_run_carries(tmp_path: Path):
    pytest.importorskip("transformers.integrations.gemma_quant", reason="transformers before 5.24 lacks the layout")
    save_tiny(tmp_path / "m", "llama")
    add(tmp_path / "m", UNLISTED, num_nextn_predict_layers=1)
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", "w8a16-sym").out
    made = lowbit.export(run, "gemma")
    assert made.warnings == []
    file = made.out / "model-carried.safetensors"
    assert file.read_bytes() == (run / "model-carried.safetensors").read_bytes()
    index = json.loads((made.out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for name, own in index.items() if own == file.name} == UNLISTED.keys()
    (found,) = lowbit.verify(run, [made.out])
    assert found.ok
    assert found.logits is not None
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (found,) = lowbit.verify(run, [made.out], logits=False)
    assert found.other == [file.name]


def test_a_layer_too_many_is_refused_unless_it_predicts_several_tokens(tmp_path: Path):
    save_tiny(tmp_path / "m", "llama")
    add(tmp_path / "m", {UP: UNLISTED[UP]})
    with pytest.raises(lowbit.LowbitError, match=rf"has a tensor '{UP}' that its config.json does not imply"):
        quantize_tiny(tmp_path / "m", tmp_path / "run", "w8a16g32-sym")


def test_a_misspelt_name_is_no_unlisted_tensor(tmp_path: Path):
    save_tiny(tmp_path / "m", "llama")
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    tensors["model.norn.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(lowbit.LowbitError, match=r"has no tensor 'model\.norm\.weight'"):
        quantize_tiny(tmp_path / "m", tmp_path / "run", "w8a16g32-sym")


def test_models_without_such_tensors_have_no_file_for_them(tmp_path: Path):
    save_tiny(tmp_path / "m", "llama")
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", "w8a16g32-sym").out
    assert not (run / "model-carried.safetensors").exists()
    assert json.loads((run / "lowbit.json").read_text())["carried"] == []
    assert "carried_over" not in inspect_model(str(run), "w4a16", "rtn")


@pytest.mark.parametrize("prefix", ["", "model."], ids=["bare", "own"])
def test_names_of_a_base_model(prefix: str, tmp_path: Path):
    save_tiny(tmp_path / "m", "qwen3", tie_word_embeddings=True)
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    save_file({prefix + k.removeprefix("model."): v for k, v in tensors.items()}, file, metadata={"format": "pt"})
    config = load_config(tmp_path / "m")
    checkpoint, names = open_weights(tmp_path / "m", config)
    assert checkpoint.names == sorted(tensors)
    assert names.stored("model.norm.weight") == "model.norm.weight"  # a run has the model's names
    read = checkpoint.read(["model.norm.weight"])["model.norm.weight"]
    assert torch.equal(read, tensors["model.norm.weight"])


def test_names_of_a_wrapped_model(tmp_path: Path):
    model = save_wrapped(tmp_path / "m", "gemma3")
    checkpoint, names = open_weights(tmp_path / "m", load_config(tmp_path / "m"))
    tied = "lm_head.weight"
    assert {*checkpoint.names} == model.state_dict().keys() - {tied}
    embed = "model.language_model.embed_tokens.weight"
    assert checkpoint.name_in_file(embed) == names.stored(embed) == "language_model.model.embed_tokens.weight"
    packed = "model.language_model.layers.0.mlp.up_proj.weight_packed"
    assert names.stored(packed) == "language_model.model.layers.0.mlp.up_proj.weight_packed"
    assert names.rename(names.stored(packed)) == packed


def test_two_tensors_of_one_name(tmp_path: Path):
    save_wrapped(tmp_path / "m", "gemma3")
    add(tmp_path / "m", {"model.language_model.norm.weight": torch.ones(64)})
    with pytest.raises(lowbit.LowbitError, match="two names of one tensor: delete one of them"):
        open_weights(tmp_path / "m", load_config(tmp_path / "m"))


def test_another_class_than_the_one_of_the_config_is_refused(tmp_path: Path):
    save_wrapped(tmp_path / "m", "gemma3")
    content = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(
        json.dumps({**content, "architectures": ["Qwen3VLForConditionalGeneration"]})
    )
    with pytest.raises(
        lowbit.LowbitError, match=r"its model_type 'gemma3' is that of Gemma3For\w+: they do not match"
    ):
        lowbit.load(tmp_path / "m")


def test_tensors_are_copied_by_their_bytes(tmp_path: Path):
    save_file(UNLISTED, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(3, 2, dtype=torch.float64)}, tmp_path / "b.safetensors")
    names = {"x": "b.safetensors", "mtp.fc.weight": "a.safetensors", "vision.patch.weight": "a.safetensors"}
    assert copy_tensors(tmp_path, names, tmp_path / "c.safetensors") == 48 + 12 + 3
    copied = load_file(tmp_path / "c.safetensors")
    assert copied.keys() == names.keys()
    assert torch.equal(copied["mtp.fc.weight"], UNLISTED["mtp.fc.weight"])
    assert torch.equal(copied["x"], torch.ones(3, 2, dtype=torch.float64))
    assert copied["vision.patch.weight"].dtype == torch.float8_e4m3fn
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
