"""OLMo 2 and 3, whose norms are behind each half and over all heads of q and of k, and OLMoE.

OLMo 3 is OLMo 2 with sliding windows, in whose layers nothing scales the rotary embedding.
https://github.com/ggml-org/llama.cpp/tree/master/src/models (olmo2, olmoe)
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import (
    Architecture,
    Facts,
    expected,
    experts,
    has_biases,
    windowed,
)
from lowbit.exporters.gguf_rope import ropes


def _olmo2_unlike(config: Any) -> str | None:
    return has_biases(config, "olmo2", "attention_bias")


def _olmo3_facts(config: Any) -> Facts:
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": windowed(config),
        "rope.freq_base_swa": None,  # one base serves all layers
    }


def _olmo3_unlike(config: Any) -> str | None:
    full, sliding = ropes(config)
    if sliding is not None and sliding["rope_theta"] != full["rope_theta"]:
        return "rope_parameters.rope_theta differs between kinds of layers; llama.cpp's olmo2 has one for all"
    if full.get("rope_type", "default") == "linear":
        return "rope_parameters.rope_type 'linear'; llama.cpp's olmo2 with windows was checked with default and yarn"
    if not config.sliding_window:
        return f"sliding_window {config.sliding_window}; llama.cpp's olmo2 takes 0 for no window in any layer"
    return _olmo2_unlike(config)


def _olmoe_facts(config: Any) -> Facts:
    return experts(config.num_experts, config.num_experts_per_tok, config.intermediate_size)


def _olmoe_unlike(config: Any) -> str | None:
    if config.num_key_value_heads != config.num_attention_heads:
        return f"num_key_value_heads {config.num_key_value_heads}; llama.cpp's olmoe takes num_attention_heads"
    return expected(config, "olmoe", norm_topk_prob=False, clip_qkv=None) or has_biases(
        config, "olmoe", "attention_bias"
    )


OLMO2 = Architecture("olmo2", square=True, head="own", unlike=_olmo2_unlike)
OLMO3 = Architecture("olmo2", square=True, head="own", facts=_olmo3_facts, unlike=_olmo3_unlike)
OLMOE = Architecture("olmoe", square=True, head="own", facts=_olmoe_facts, unlike=_olmoe_unlike)
