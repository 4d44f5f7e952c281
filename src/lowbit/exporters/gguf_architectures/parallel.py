"""Attention and MLP beside each other on one residual stream: Cohere 2, StableLM (some), GPT-NeoX (Pythia).

https://github.com/ggml-org/llama.cpp/tree/master/src/models (cohere2, stablelm, gptneox)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.exporters.gguf_architectures.architecture import (
    LAYER_NORM,
    Architecture,
    Facts,
    expected,
    has_biases,
    windowed,
)


def _cohere2_facts(config: Any) -> Facts:
    """Layers without a window have no rotary embedding, which the graph takes for granted."""
    return {
        "logit_scale": float(config.logit_scale),
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": windowed(config),
    }


def _cohere2_unlike(config: Any) -> str | None:
    if not config.sliding_window:
        return f"sliding_window {config.sliding_window}; llama.cpp's cohere2 needs one"
    if not config.logit_scale:
        return "logit_scale 0; llama.cpp's cohere2 takes 0 for none"
    return has_biases(config, "cohere2", "attention_bias")


def _stablelm_facts(config: Any) -> Facts:
    return {"use_parallel_residual": bool(config.use_parallel_residual)}


def _neox_facts(config: Any) -> Facts:
    return {"use_parallel_residual": bool(config.use_parallel_residual), "attention.head_count_kv": None}


def _neox_unlike(config: Any) -> str | None:
    if config.hidden_act not in ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        return f"hidden_act '{config.hidden_act}'; llama.cpp computes gelu_pytorch_tanh for gptneox"
    return expected(config, "gptneox", attention_bias=True)


def _neox_warnings(config: Any) -> list[str]:
    if config.hidden_act != "gelu":
        return []
    return ["hidden_act gelu: llama.cpp computes its approximation by tanh, which is off by up to 0.0005"]


def _neox_rows(config: Any, name: str) -> Tensor | None:
    """q, k and v of head 0, then of head 1, ... in the model; all of q, all of k, all of v in the file."""
    if not name.endswith(("query_key_value.weight", "query_key_value.bias")):
        return None
    heads = config.num_attention_heads
    dim = config.hidden_size // heads
    return torch.arange(3 * heads * dim).reshape(heads, 3, dim).transpose(0, 1).flatten()


COHERE2 = Architecture(
    "cohere2",
    ("default",),
    epsilon=LAYER_NORM,
    square=True,
    head="tied",
    tensor_scales=True,
    facts=_cohere2_facts,
    unlike=_cohere2_unlike,
)
STABLELM = Architecture(
    "stablelm",
    partial_rope=True,
    epsilon=LAYER_NORM,
    square=True,
    head="own",
    facts=_stablelm_facts,
)
GPT_NEOX = Architecture(
    "gptneox",
    partial_rope=True,
    activation="",
    epsilon=LAYER_NORM,
    square=True,
    head="own",
    facts=_neox_facts,
    unlike=_neox_unlike,
    warnings=_neox_warnings,
    rows=_neox_rows,
)
