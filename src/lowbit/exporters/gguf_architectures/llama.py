"""Llama, Mistral, Mixtral, SmolLM3, Ministral 3, Seed-OSS, ERNIE 4.5: ``llama`` and what is close to it.

https://github.com/ggml-org/llama.cpp/tree/master/src/models (llama, smollm3, mistral3, seed-oss, ernie4-5)
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import (
    ANY_ROPE,
    Architecture,
    Facts,
    experts,
    has_biases,
    has_window,
)


def _llama_unlike(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    return f"sliding_window {window}; llama.cpp's llama has none" if window is not None else None


def _mixtral_facts(config: Any) -> Facts:
    return experts(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size)


def _smollm3_unlike(config: Any) -> str | None:
    rotated = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != rotated:
        return "no_rope_layers differ from llama.cpp's for smollm3, where one layer in 4 has no rotary embedding"
    return has_biases(config, "smollm3", "attention_bias", "mlp_bias") or has_window(config, "smollm3")


def _ministral3_facts(config: Any) -> Facts:
    """Queries are multiplied by ``1 + beta ln(1 + floor(position / L))`` with ``L`` the original context."""
    rope = config.rope_parameters
    out: Facts = {"attention.temperature_scale": float(rope.get("llama_4_scaling_beta") or 0.0) or None}
    if out["attention.temperature_scale"]:
        out["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return out


def _ministral3_unlike(config: Any) -> str | None:
    rope = config.rope_parameters
    if rope.get("llama_4_scaling_beta") and not rope.get("original_max_position_embeddings"):
        return "rope_parameters.llama_4_scaling_beta without original_max_position_embeddings, which it needs"
    window = getattr(config, "sliding_window", None)
    return f"sliding_window {window}; llama.cpp's mistral3 has none" if window is not None else None


def _seed_oss_unlike(config: Any) -> str | None:
    return has_biases(config, "seed_oss", "attention_out_bias", "mlp_bias")


def _ernie_unlike(config: Any) -> str | None:
    return has_biases(config, "ernie4_5", "use_bias")


LLAMA = Architecture("llama", ANY_ROPE, adjacent=True, tensor_scales=True, unlike=_llama_unlike)
MIXTRAL = Architecture(
    "llama", ANY_ROPE, adjacent=True, tensor_scales=True, facts=_mixtral_facts, unlike=_llama_unlike
)
SMOLLM3 = Architecture("smollm3", adjacent=True, unlike=_smollm3_unlike)
MINISTRAL3 = Architecture(
    "mistral3",
    ANY_ROPE,
    yarn_betas=True,
    adjacent=True,
    tensor_scales=True,
    facts=_ministral3_facts,
    unlike=_ministral3_unlike,
)
SEED_OSS = Architecture("seed_oss", unlike=_seed_oss_unlike)
# Neighbouring dimensions rotate together in the library, too.
ERNIE = Architecture("ernie4_5", unlike=_ernie_unlike)
