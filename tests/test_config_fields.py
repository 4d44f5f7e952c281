"""Fields of ``config.json`` that do not change what a model computes change nothing here, and stop nothing."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.config_fields import without_neutral
from lowbit.errors import LowbitError
from lowbit.evaluation.generate import generate_text
from runs import quantize_tiny, streamed_logits
from tiny import save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

NEUTRAL: list[dict[str, Any]] = [
    *(
        {key: kernel}
        for key in ("_attn_implementation", "attn_implementation")
        for kernel in (
            "flash_attention_2",
            "flash_attention_3",
            "sdpa",
            "eager",
            "flex_attention",
            "no_such_kernel",
            "kernels-community/vllm-flash-attn3",
            {"": "flash_attention_2"},
            None,
        )
    ),
    {"_attn_implementation_internal": "flash_attention_2", "_attn_implementation_autoset": True},
    {"_experts_implementation": "grouped_mm"},
    *(
        {key: value}
        for key in ("torch_dtype", "dtype")
        for value in ("bfloat16", "float16", "float99", "auto", None, 3)
    ),
    {"return_dict": False},
    {"return_dict": "no"},
    {"use_return_dict": False},
    {"output_attentions": True},
    {"output_attentions": True, "_attn_implementation": "flash_attention_2"},
    {"output_hidden_states": True},
    {"use_cache": False},
    {"torchscript": True},
    {"pruned_heads": {"0": [1]}},
    {"chunk_size_feed_forward": 7},
    {"gradient_checkpointing": True},
    {"quantization_config": None},
    {"quantization_config": {}},
    {"problem_type": "single_label_classification", "num_labels": 1},
    {"problem_type": "something"},
    {"num_labels": 7},
    {"id2label": {"0": "a"}, "label2id": {"a": 0}},
    {"id2label": "none"},
    {"finetuning_task": "sst2", "task_specific_params": {"x": 1}},
    {"attention_dropout": 0.5},
    {"temperature": 0.1, "do_sample": True, "repetition_penalty": 9.0},
    {"transformers_version": "99.0"},
    {"_name_or_path": "somebody/else"},
    {"something_of_a_trainer": {"lora": [1, 2]}},
]


def put(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@cache
def right(folder: Path) -> Tensor:
    """Logits of transformers' own model, in float32, without any of these fields."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tiny_ids(2, 12)).logits


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    for family in ("llama", "gemma3"):  # Gemma's model holds a number in the dtype that it is built in
        save_tiny(root / family, family, num_hidden_layers=1)
    return {family: root / family for family in ("llama", "gemma3")}


@pytest.mark.parametrize("changes", NEUTRAL, ids=lambda changes: json.dumps(changes)[:60])
def test_a_field_that_changes_nothing(changes: dict[str, Any], plain: dict[str, Path], tmp_path: Path) -> None:
    family = "gemma3" if {"dtype", "torch_dtype"} & set(changes) else "llama"
    save_tiny(m := tmp_path / "m", family, num_hidden_layers=1)
    put(m, changes)
    ids, expected = tiny_ids(2, 12), right(plain[family])
    with torch.no_grad():
        loaded = lowbit.load(m)(ids)
        assert torch.allclose(loaded.logits, expected, atol=1e-5)
        assert loaded.hidden_states is None
    assert torch.allclose(streamed_logits(m, ids), expected, atol=1e-5)
    run = quantize_tiny(m, tmp_path / "run", "w8a16g32-sym").out
    with torch.no_grad():
        ours = lowbit.load(run)(ids).logits
    assert torch.allclose(ours, expected, rtol=0, atol=0.1 * float(expected.std()))
    assert torch.allclose(streamed_logits(run, ids), ours, atol=1e-4)
    shipped = json.loads((run / "config.json").read_text())
    assert not any("attn_implementation" in key or "experts_implementation" in key for key in shipped)


def test_evaluate_and_a_greedy_text_do_not_mind_either(tmp_path: Path) -> None:
    save_tiny(m := tmp_path / "m", "llama", num_hidden_layers=1)
    before = lowbit.evaluate(str(m), data=str(m / "calib.txt"), length=16, tokens=64).perplexity
    put(m, {"_attn_implementation": "flash_attention_2", "return_dict": False, "output_attentions": True})
    assert lowbit.evaluate(str(m), data=str(m / "calib.txt"), length=16, tokens=64).perplexity == before
    assert len(generate_text(m, "hello", 3)) > len("hello")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tie_word_embeddings": "yes"}, "not a valid config"),
    ({"configuration_files": ["config.4.0.0.json"]}, "refers to other configs"),
    ({"quantization_config": {"quant_method": "quanto"}}, r"already quantized \('quanto'\)"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"weights are quantized \(AWQ, .* none are"),
    ({"quantization_config": {"quant_method": "awq", "bits": 5}}, r"bits = 5 in quantization_config; read are 4"),
    ({"num_hidden_layers": None}, "not a valid config"),
    ({"transformers_weights": "../model.safetensors"}, "allowed is the name of a .safetensors file"),
    ({"transformers_weights": "none.safetensors"}, "lacks none.safetensors"),
    ({"transformers_weights": "adapter_model.bin"}, "allowed is the name of a .safetensors file"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[next(iter(changes)) for changes, _ in WRONG])
def test_a_field_that_cannot_be_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_tiny(m := tmp_path / "m", "llama")
    put(m, changes)
    asked = [
        lambda: quantize_tiny(m, tmp_path / "run", "w8a16"),
        lambda: lowbit.evaluate(str(m), data=str(m / "calib.txt"), length=16, tokens=64),
        lambda: lowbit.load(m),
    ]
    for ask in asked:
        with pytest.raises(LowbitError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_fields_that_matter_stay() -> None:
    kept = {
        "hidden_size": 3,
        "attention_bias": True,
        "rope_parameters": {},
        "tie_word_embeddings": None,
        "auto_map": {},
    }
    assert without_neutral(kept) == kept
