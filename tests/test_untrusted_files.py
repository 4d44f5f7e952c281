"""What files of a model may say: sizes take no memory, JSON ends, names print, config fields stay fields."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from fuzzing.guards import MIB, guarded
from lowbit.checkpoints.config import load_config
from lowbit.checkpoints.json_file import DEEPEST, read_json
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.shards import INDEX
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError, one_line, printable, shown
from lowbit.pipeline.inspect import inspect_model
from lowbit.quant.format import QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.layouts import LAYOUTS
from runs import quantize_tiny, streamed_logits
from tiny import save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

FAMILIES = ("llama", "opt", "gemma2", "phi3")
PROJECTION = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of several families, and runs in both layouts, by name."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny(root / family, family)
    for name, scheme in (("packed", "w4a16g16-asym"), ("plain", "w4a8g16-sym")):
        quantize_tiny(root / "llama", root / name, scheme)
    return root


def copied(models: Path, name: str, tmp_path: Path, **changes: Any) -> Path:
    """A copy of a model with fields of its config set."""
    m = tmp_path / "m"
    shutil.copytree(models / name, m)
    content = json.loads((m / "config.json").read_text()) | changes
    (m / "config.json").write_text(json.dumps(content))
    return m


def readers(m: Path, tmp_path: Path) -> dict[str, Callable[[], object]]:
    """Everything that opens a float model."""
    text = {"data": str(m / "calib.txt"), "length": 16}
    return {
        "load": lambda: lowbit.load(m),
        "evaluate": lambda: lowbit.evaluate(str(m), tokens=32, **text),
        "inspect": lambda: inspect_model(str(m), "w8a16", "rtn"),
        "quantize": lambda: lowbit.quantize(
            str(m), tmp_path / "out", scheme="w8a16", recipe="rtn", samples=1, **text
        ),
    }


def refused(read: Callable[[], object], words: str) -> None:
    """The call is refused in one line that has ``words``, with little memory and in no time."""
    _, error, _, taken = guarded(read)
    assert isinstance(error, LowbitError), repr(error)
    assert re.search(words, str(error)), str(error)
    assert str(error).isprintable()
    assert taken < 100 * MIB


HUGE = [
    *(("llama", {"num_hidden_layers": value}) for value in (10**5, 10**9, 2**63, -1, True, 2.0, "3", None)),
    *(("llama", {key: 2**40}) for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")),
    ("llama", {"num_attention_heads": 2**40}),
    ("opt", {"max_position_embeddings": 2**40}),
    ("opt", {"ffn_dim": 2**40}),
    ("opt", {"word_embed_proj_dim": 2**40}),
    ("phi3", {"vocab_size": 2**62}),
]


@pytest.mark.parametrize(("family", "changes"), HUGE, ids=[f"{f} {c}" for f, c in HUGE])
def test_sizes_that_the_checkpoint_does_not_have_take_no_memory(family, changes, models, tmp_path):
    m = copied(models, family, tmp_path, **changes)
    for read in readers(m, tmp_path).values():
        refused(read, "match|no model can be built|not a valid config|config.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", ["packed", "plain"])
@pytest.mark.parametrize("key", ["intermediate_size", "hidden_size", "vocab_size", "head_dim"])
def test_sizes_that_a_run_folder_does_not_have_take_no_memory(run, key, models, tmp_path):
    m = copied(models, run, tmp_path, **{key: 2**40})
    said = "match|a head.s width"
    refused(lambda: lowbit.load(m), said)
    refused(lambda: streamed_logits(m, tiny_ids(1, 8)), said)
    refused(lambda: inspect_model(str(m), "w8a16", "rtn"), said)
    refused(lambda: lowbit.export(m, "gptq", out=tmp_path / "exported"), said)


COMPUTES_NOTHING = [
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("opt", {"dropout": 2}, "[Dd]ropout|probability"),
    ("opt", {"dropout": "x"}, "config.json"),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 3}},
        "config.json",
    ),
    ("llama", {"partial_rotary_factor": "x"}, "partial_rotary_factor"),
    ("llama", {"num_key_value_heads": 0}, "key/value heads 0"),
    ("llama", {"architectures": ["OPTForCausalLM"]}, "config.json"),
    ("opt", {"architectures": ["LlamaForCausalLM"]}, "config.json"),
    ("llama", {"architectures": ["Qwen3ForCausalLM"]}, "they do not match"),
    ("llama", {"architectures": [None]}, "unknown architecture 'None'"),
    ("llama", {"architectures": [{"a": 1}]}, "unknown architecture"),
]


@pytest.mark.parametrize(
    ("family", "changes", "words"), COMPUTES_NOTHING, ids=[str(c) for _, c, _ in COMPUTES_NOTHING]
)
def test_a_config_that_no_layer_can_compute_with_is_refused_before_any_work(family, changes, words, models, tmp_path):
    m = copied(models, family, tmp_path, **changes)
    asked = readers(m, tmp_path)
    for name in ("load", "evaluate", "quantize"):
        refused(asked[name], words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [[], ["llama"], {}, {"a": 1}, 3, True, None, "x", "x" * 10_000])
def test_a_model_type_that_is_none(kind, models, tmp_path):
    with pytest.raises(LowbitError, match="has the model_type") as caught:
        load_config(copied(models, "llama", tmp_path, model_type=kind))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [None, "x", {}, [[]], 3])
@pytest.mark.parametrize(
    "name", ["sub_configs", "attribute_map", "to_dict", "update", "__class__", "__dict__", "get_text_config"]
)
def test_no_field_replaces_what_a_config_class_needs(name, value, models, tmp_path, capfd):
    with pytest.raises(LowbitError, match=f"has a field '{name}'"):
        load_config(copied(models, "llama", tmp_path, **{name: value}))
    assert len(capfd.readouterr().err.splitlines()) < 3


def test_a_plan_for_many_devices_changes_nothing(models, tmp_path):
    m = copied(models, "llama", tmp_path, base_model_tp_plan={"x": "colwise"}, keys_to_ignore_at_inference=["y"])
    ids = tiny_ids(1, 8)
    assert torch.equal(streamed_logits(m, ids), streamed_logits(models / "llama", ids))


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (nested(DEEPEST + 1), f"more than {DEEPEST} deep"),
        (nested(50_000), f"more than {DEEPEST} deep"),
        ("[" * 100_000, f"more than {DEEPEST} deep"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"a": ' + "[" * DEEPEST + "]" * DEEPEST + "}", f"more than {DEEPEST} deep"),
        ("", "Expecting value"),
    ],
)
def test_json_without_end_is_refused(text, words, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(LowbitError, match=words):
        read_json(tmp_path / "x.json")


def test_json_as_deep_as_allowed_is_read_and_written(tmp_path):
    (tmp_path / "x.json").write_text(nested(DEEPEST))
    write_json(tmp_path / "y.json", read_json(tmp_path / "x.json"))
    assert read_json(tmp_path / "y.json") == json.loads(nested(DEEPEST))


def test_halves_of_characters_survive_a_run(models, tmp_path):
    """A name with one passes through config and manifest, and ends no run when its files are written."""
    content = {"zz": "\ud800", "\udcff": ["ö", 1e400]}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    m = copied(models, "llama", tmp_path, zz="\ud800")
    out = quantize_tiny(m, tmp_path / "run", "w8a16").out
    assert json.loads((out / "config.json").read_text())["zz"] == "\ud800"


def test_messages_are_one_printable_line():
    message = str(LowbitError("a\nb\x00\x1b[31m\ud800\u202e ö 名"))
    assert message == "a\\nb\\x00\\x1b[31m\\ud800\\u202e ö 名"
    assert printable(message) == message
    assert one_line(ValueError("a\n  b\x07")) == "a b\\x07"
    assert one_line(ValueError()) == "ValueError"
    assert shown(10**5000) == "a int"
    assert len(shown("x" * 1000)) < 210


@pytest.mark.parametrize("name", ["line\nbreak", "\x00", "\x1b[31m", "x" * 10_000, "é" * 200])
def test_a_shard_of_a_name_that_no_file_has(name, tmp_path):
    save_tiny(tmp_path / "m", "llama", shards=True)
    content = json.loads((tmp_path / "m" / INDEX).read_text())
    content["weight_map"]["model.norm.weight"] = name
    (tmp_path / "m" / INDEX).write_text(json.dumps(content))
    with pytest.raises(LowbitError, match="shard") as caught:
        Checkpoint(tmp_path / "m")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_two_names_of_one_tensor_are_refused(models, tmp_path):
    m = copied(models, "llama", tmp_path)
    tensors = load_file(m / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        twice = {**tensors, name.removeprefix("model."): tensors[name] * 2}
        save_file(twice, m / "model.safetensors", metadata={"format": "pt"})
        for read in readers(m, tmp_path).values():
            refused(read, f"both '{name}' and '{name.removeprefix('model.')}'")


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a row less": lambda value: value[:-1].clone(),
    "a column less": lambda value: value[..., :-1].clone(),
    "a dimension more": lambda value: value[None].clone(),
    "flat": lambda value: value.flatten(),
    "empty": lambda value: value[:0].clone(),
    "other numbers of the same bytes": lambda value: value.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.float32 if value.dtype == torch.int32 else torch.int32}.get(
            value.element_size(), torch.float64
        )
    ),
    "wider numbers": lambda value: value.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("run", ["packed", "plain"])
def test_tensors_of_a_run_folder_have_their_dtype_and_shape(run, change, models, tmp_path):
    m = copied(models, run, tmp_path)
    shard = m / "block-00000.safetensors"
    tensors = load_file(shard)
    for name in [name for name in tensors if name.startswith(PROJECTION)]:
        changed = CHANGES[change](tensors[name])
        if (changed.dtype, changed.shape) == (tensors[name].dtype, tensors[name].shape):
            continue  # a shape is flat already
        save_file({**tensors, name: changed}, shard, metadata={"format": "pt"})
        for read in (lambda: lowbit.load(m), lambda: streamed_logits(m, tiny_ids(1, 8))):
            refused(read, name)
        with pytest.raises(LowbitError):
            lowbit.export(m, "gguf" if run == "packed" else "vllm", out=tmp_path / "exported")


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_weight_is_stored_as_stated(bits, symmetric, layout):
    for group, columns in ((None, 40), (16, 48), (8, 40)):
        format = IntFormat(bits, group=group, symmetric=symmetric)
        weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(bits))
        q: QTensor = format.quantize(weight, format.qparams(weight))
        packed = LAYOUTS[layout].pack(q)
        found = {name: (value.dtype, tuple(value.shape)) for name, value in packed.items()}
        stated = LAYOUTS[layout].stored(format, 40, columns)
        assert found == {name: (stored.dtype, stored.shape) for name, stored in stated.items()}
        assert torch.equal(LAYOUTS[layout].unpack(packed, format).codes, q.codes)


@pytest.mark.parametrize("shape", [[7, 41], [8, 40], [-7, 40], [2**62, 40], [7], [7, 40, 1], [0, 0]])
def test_a_shape_that_the_codes_do_not_have(shape):
    format = IntFormat(4, symmetric=True)
    weight = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    packed = LAYOUTS["pack-quantized"].pack(format.quantize(weight, format.qparams(weight)))
    with pytest.raises(ValueError, match=r"is torch\.int|shape is"):
        LAYOUTS["pack-quantized"].unpack({**packed, "weight_shape": torch.tensor(shape)}, format)
