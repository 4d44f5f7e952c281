"""Gemma 4 (text): inputs of their own for each layer, keys and values of earlier layers, heads that differ by layer.

Layers with full attention have wider heads and, in the larger models, no matrix for values. The last layers have no
keys and values: each takes those of the last layer of its kind before them.
https://github.com/ggml-org/llama.cpp/blob/master/src/models/gemma4.cpp
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import Architecture, Facts, experts, has_biases, windowed
from lowbit.exporters.gguf_heads import head_dim, head_dims

BEFORE_SHARED = ["sliding_attention", "full_attention"]


def _facts(config: Any) -> Facts:
    layers, windows = range(config.num_hidden_layers), sliding_dim(config)
    shared = config.num_hidden_layers - config.num_kv_shared_layers
    wide = 2 if config.use_double_wide_mlp else 1
    return {
        "feed_forward_length": [config.intermediate_size * (wide if i >= shared else 1) for i in layers],
        "attention.key_length_swa": windows,
        "attention.value_length_swa": windows,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": windowed(config),
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
        "final_logit_softcapping": float(config.final_logit_softcapping or 0.0),  # without the key it is 30
        "rope.dimension_count": head_dim(config),
        "rope.dimension_count_swa": windows,
        **_mixture(config),
    }


def _mixture(config: Any) -> Facts:
    """Keys of experts beside the dense MLP of each layer."""
    if not config.enable_moe_block:
        return {}
    return experts(config.num_experts, config.top_k_experts, config.moe_intermediate_size)


def _unlike(config: Any) -> str | None:
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input != config.vocab_size:
        return (
            f"vocab_size_per_layer_input {config.vocab_size_per_layer_input}; llama.cpp's gemma4 takes vocab_size "
            f"{config.vocab_size}"
        )
    return _shared_unlike(config) or _heads_unlike(config) or has_biases(config, "gemma4", "attention_bias")


def _shared_unlike(config: Any) -> str | None:
    """llama.cpp takes the last layer with keys of its own to be the last with full attention, and the one before it
    to be the last with a window."""
    own = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    if config.num_kv_shared_layers and own[-2:] != BEFORE_SHARED:
        return (
            f"num_kv_shared_layers {config.num_kv_shared_layers} behind layers of {', '.join(own[-2:])}; llama.cpp's "
            f"gemma4 takes {' and '.join(BEFORE_SHARED)}"
        )
    return None


def _heads_unlike(config: Any) -> str | None:
    for index, (kind, width) in enumerate(zip(config.layer_types, head_dims(config), strict=True)):
        if width != (head_dim(config) if kind == "full_attention" else sliding_dim(config)):
            return f"per_layer_config of layer {index} has head_dim {width}; llama.cpp's gemma4 has one for each kind"
    return None


def sliding_dim(config: Any) -> int:
    """Width of a head in layers with a window; without such layers, of any."""
    kinds = zip(config.layer_types, head_dims(config), strict=True)
    return next((width for kind, width in kinds if kind == "sliding_attention"), head_dim(config))


GEMMA4 = Architecture(
    "gemma4",
    ("proportional",),
    activation="gelu_pytorch_tanh",
    facts=_facts,
    unlike=_unlike,
    names={
        "layer_scalar": "layer_output_scale.weight",
        "router.proj.weight": "ffn_gate_inp.weight",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
    },
)
