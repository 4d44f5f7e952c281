"""gpt-oss: experts with biases and a clamp, attention sinks, a window in every other layer.

https://github.com/ggml-org/llama.cpp/blob/master/src/models/openai-moe.cpp
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import Architecture, Facts, expected, experts, windowed
from lowbit.exporters.gguf_rope import ramp_warning


def _facts(config: Any) -> Facts:
    return experts(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) | {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": windowed(config),
    }


def _unlike(config: Any) -> str | None:
    if not config.sliding_window:
        return f"sliding_window {config.sliding_window}; llama.cpp's gpt-oss needs one"
    return expected(config, "gpt-oss", attention_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0)


GPT_OSS = Architecture(
    "gpt-oss",
    any_ramp=True,
    head="own",
    facts=_facts,
    unlike=_unlike,
    warnings=ramp_warning,
    names={"self_attn.sinks": "attn_sinks.weight"},
)
