"""Hunyuan, dense and with experts: norms on q and k behind the rotary embedding, whose base a factor may stretch.

https://github.com/ggml-org/llama.cpp/tree/master/src/models (hunyuan-dense, hunyuan-moe)
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import PLAIN, Architecture, Facts, experts, has_biases
from lowbit.exporters.gguf_heads import head_dim


def stretched_base(theta: float, alpha: float, dim: int) -> float:
    """The base of rotary frequencies over a head of width ``dim`` that a factor ``alpha`` stretches.

    >>> stretched_base(10000.0, 4.0, 4)
    160000.0
    """
    return float(theta * alpha ** (dim / (dim - 2)))


def _rope_facts(config: Any) -> Facts:
    rope = config.rope_parameters
    if rope.get("rope_type") != "dynamic":
        return {}
    return {"rope.freq_base": stretched_base(rope["rope_theta"], rope["alpha"], head_dim(config))}


def _moe_facts(config: Any) -> Facts:
    width = config.intermediate_size
    mixture = experts(config.num_experts, config.moe_topk, width) | {"expert_shared_feed_forward_length": width}
    return _rope_facts(config) | mixture


def _unlike(config: Any, name: str) -> str | None:
    rope = config.rope_parameters
    if rope.get("rope_type") == "dynamic" and not rope.get("alpha"):
        return f"rope_parameters.rope_type 'dynamic' without alpha: by the text's length; llama.cpp's {name} has none"
    return has_biases(config, name, "attention_bias", "mlp_bias")


def _dense_unlike(config: Any) -> str | None:
    return _unlike(config, "hunyuan-dense")


def _moe_unlike(config: Any) -> str | None:
    for field in ("num_experts", "moe_topk"):
        if not isinstance(getattr(config, field), int):
            return f"{field} {getattr(config, field)}; llama.cpp's hunyuan-moe has one number for all layers"
    return _unlike(config, "hunyuan-moe")


HUNYUAN = Architecture("hunyuan-dense", (*PLAIN, "dynamic"), facts=_rope_facts, unlike=_dense_unlike)
HUNYUAN_MOE = Architecture("hunyuan-moe", (*PLAIN, "dynamic"), facts=_moe_facts, unlike=_moe_unlike)
