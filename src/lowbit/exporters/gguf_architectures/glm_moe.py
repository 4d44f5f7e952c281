"""GLM-4.5: dense layers, then layers with experts that sigmoids choose, one of which every token passes.

https://github.com/ggml-org/llama.cpp/blob/master/src/models/glm4-moe.cpp
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import Architecture, Facts, expected, experts

SIGMOID = 2  # llama.cpp's number of the gate's function


def _facts(config: Any) -> Facts:
    return experts(config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size) | {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_shared_count": config.n_shared_experts,
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
    }


def _unlike(config: Any) -> str | None:
    if not config.n_shared_experts:
        return "n_shared_experts 0; llama.cpp's glm4moe computes a shared expert"
    return expected(config, "glm4moe", n_group=1, topk_group=1)


GLM4_MOE = Architecture(
    "glm4moe",
    partial_rope=True,
    facts=_facts,
    unlike=_unlike,
    names={"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"},
)
