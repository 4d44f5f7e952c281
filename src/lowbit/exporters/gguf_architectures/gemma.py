"""Gemma 2 and Gemma 3 (text): norms that multiply by ``1 + weight``, windows by a period, a scale by the size.

https://github.com/ggml-org/llama.cpp/tree/master/src/models (gemma2, gemma3)
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import Architecture, Facts, plus_one
from lowbit.exporters.gguf_heads import head_dim

# Period of layers with full attention, the others have a window; depth at which the scale follows the width.
PERIODS = {"gemma2": 2, "gemma3": 6}
LARGEST = {"gemma2": 46, "gemma3": 62}
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def _facts(config: Any) -> Facts:
    caps = {cap: float(value) for cap in CAPS if (value := getattr(config, cap, None)) is not None}
    return {"attention.sliding_window": config.sliding_window} | caps


def _unlike(config: Any, name: str) -> str | None:
    layers, period = config.num_hidden_layers, PERIODS[name]
    if getattr(config, "attention_bias", False):
        return f"attention_bias; llama.cpp's {name} has no attention biases"
    types = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    if list(config.layer_types) != types:
        return f"layer_types differ from llama.cpp's for {name}, where one in {period} has full attention"
    wide = layers == LARGEST[name]
    scale = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
    if config.query_pre_attn_scalar != scale:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar}; llama.cpp assumes {scale} for this {name}"
    return None


def _gemma2_unlike(config: Any) -> str | None:
    for cap in CAPS:
        if not getattr(config, cap):
            return f"{cap} {getattr(config, cap)}; llama.cpp's gemma2 always caps: without the key by its default"
    return _unlike(config, "gemma2")


def _gemma3_unlike(config: Any) -> str | None:
    if getattr(config, "attn_logit_softcapping", None):
        return "attn_logit_softcapping; llama.cpp's gemma3 has none"
    return _unlike(config, "gemma3")


GAINS = {"norm.weight": plus_one}
GEMMA2 = Architecture(
    "gemma2",
    ("default", "linear"),
    activation="gelu_pytorch_tanh",
    head="tied",
    facts=_facts,
    unlike=_gemma2_unlike,
    values=GAINS,
)
GEMMA3 = Architecture(
    "gemma3",
    ("default", "linear"),
    activation="gelu_pytorch_tanh",
    facts=_facts,
    unlike=_gemma3_unlike,
    values=GAINS,
)
