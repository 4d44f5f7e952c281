"""Tiny configs of decoders that no family declares, or whose structure has something of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lowbit.models.discovery.small_model import redraw
from tiny import tiny_ids, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Partial rotary embedding; factors on the residual; norms behind the halves; short convolutions; relu^2; a head that
# has another name in files.
CONFIGS: dict[str, dict[str, Any]] = {
    "stablelm": SIZES,
    "granite": SIZES,
    "olmo2": SIZES,
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
    "nemotron": SIZES,
    "gpt_neox": SIZES,
    # Layers that return more than hidden states, with two kinds of them; a head whose bias has two names; masks that
    # have to be for as many sequences as there are; norms without parameters; code that reads a linear's weight.
    "bamba": {
        **SIZES,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "bert": {**SIZES, "is_decoder": True},
    "xglm": {**SIZES, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},
    "olmo": SIZES,
    "mamba2": {
        **SIZES,
        "num_heads": 8,
        "head_dim": 16,
        "expand": 2,
        "state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
}
WINDOWS = {**SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 0}
# What people quantize, by the type of its config.
NAMED: dict[str, dict[str, Any]] = {
    "granite": SIZES,
    "olmo2": SIZES,
    "olmo3": WINDOWS,
    "exaone4": {**WINDOWS, "sliding_window_pattern": 2},
    "smollm3": {**SIZES, "no_rope_layers": [1, 0]},
    "cohere2": {**WINDOWS, "head_dim": 16},
    "ministral3": {**SIZES, "head_dim": 16},
    "phi3": {  # as Phi-4-mini: three quarters of a head rotate
        **SIZES,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    },
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
    "falcon_h1": {
        **SIZES,
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "nemotron_h": {
        **{key: value for key, value in SIZES.items() if key != "num_hidden_layers"},
        "layers_block_type": ["mamba", "attention", "mlp"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "qwen3_5_text": {
        **SIZES,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "gemma3n_text": {
        **WINDOWS,
        **PER_LAYER,
        "head_dim": 16,
        "laurel_rank": 16,
        "activation_sparsity_pattern": [0.5, 0.0],
        "intermediate_size": [96, 96],
    },
    "gemma4_text": {  # the last two layers read the keys and values of the first two
        **WINDOWS,
        **PER_LAYER,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


def config_of(name: str, configs: dict[str, dict[str, Any]] = CONFIGS, **changes: Any) -> Any:
    """A config that names its class, as a checkpoint's does."""
    config = CONFIG_MAPPING[name](**configs[name] | changes)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return config


def saved(folder: Path, config: Any) -> Any:
    """A random model in float32 with tokenizer and text in a folder; returns the model in eval mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    redraw(model, 0)
    model.config.architectures = config.architectures
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "calib.txt").write_text("".join(chr(30 + i) for i in tiny_ids(1, 3000, seed=5)[0].tolist()))
    return model
