"""Tensors that files store one behind another, or several in one: read as the library's loader makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from decoders import SIZES
from lowbit.checkpoints.resolve import load_config
from lowbit.checkpoints.stored import StoredRows
from lowbit.errors import LowbitError
from lowbit.models.experts import state_shapes
from lowbit.models.families import architecture_of
from lowbit.models.validate import check_model, open_weights

DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # Three convolutions in the files, one in the class.
    "olmo_hybrid": {**SIZES, **DELTA, "layer_types": ["linear_attention", "full_attention"]},
    # One matrix of queries, keys and values in the files, of different heights.
    "sarvam_moe": {
        **SIZES,
        "head_dim": 16,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
}


def saved(folder: Path, type: str) -> Any:
    """A tiny model as the library saves it; returns it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[type](**CONFIGS[type]))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("type", CONFIGS)
def test_tensors_are_those_of_the_class(tmp_path, type):
    model = saved(tmp_path, type)
    own, files = model.state_dict(), load_file(tmp_path / "model.safetensors")
    config = load_config(tmp_path, False)
    checkpoint, _ = open_weights(tmp_path, config)
    assert check_model(checkpoint, config) == ()
    names = state_shapes(architecture_of(config), {name: value.shape for name, value in own.items()})
    rearranged = {name for name in names if checkpoint.rows(name) is not None}
    assert rearranged
    assert all(len(checkpoint.holders(name)) == (3 if type == "olmo_hybrid" else 1) for name in rearranged)
    assert not {checkpoint.name_in_file(n) for name in rearranged for n in checkpoint.holders(name)} - files.keys()
    read = checkpoint.read(names)
    for name in names.keys() & own.keys():
        assert torch.equal(read[name], own[name]), name


def test_files_of_other_heights_are_refused(tmp_path):
    saved(tmp_path, "olmo_hybrid")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("k_conv1d.weight"))
    tensors[name] = tensors[name][1:].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    config = load_config(tmp_path, False)
    checkpoint, _ = open_weights(tmp_path, config)
    with pytest.raises(LowbitError, match="they do not match"):
        check_model(checkpoint, config)


def test_rows_of_tensors_that_have_others():
    half = StoredRows(("gate_up",), 8, 16, 16)
    assert half.shape([(16, 4)]) == (8, 4)
    assert half.shape([(24, 4)]) == ()
    assert StoredRows(("q", "k"), 0, 12, 12).shape([(8, 1, 4), (4, 1, 3)]) == ()


@pytest.mark.parametrize(
    ("type", "name"),
    [
        ("laguna", "model.layers.1.mlp.shared_experts.gate_proj.weight_packed"),
        ("laguna", "model.layers.1.mlp.shared_experts.gate_proj.weight"),
    ],
)
def test_a_name_of_the_model_is_kept_where_a_rule_of_the_loader_would_make_another(tmp_path, type, name):
    """The rule makes ``shared_expert.`` of old files ``shared_experts.``, wherever it finds a character behind."""
    config = CONFIG_MAPPING[type](
        **{**SIZES, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LagunaForCausalLM"]}))
    save_file({name: torch.zeros(8, 8), "model.layers.0.input_layernorm.weight": torch.zeros(64)},
              tmp_path / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    checkpoint, _ = open_weights(tmp_path, load_config(tmp_path, False))
    assert name in checkpoint.names
