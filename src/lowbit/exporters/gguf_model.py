"""An architecture in GGUF: its name, its metadata, and what llama.cpp takes for granted.

llama.cpp builds the graph from the architecture's name and a few numbers. What it assumes about a family (the layers
with a sliding window, the scale of the attention) is compared with the config here, and a model that differs is
refused: its tensors would be exact, its function would not.

Sources: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp (hyperparameters by architecture),
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (keys).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
# Period of layers with full attention, the others have a window; depth at which the scale follows the width.
WINDOWS = {"gemma2": 2, "gemma3": 6}
LARGEST = {"gemma2": 46, "gemma3": 62}


def architecture(config: Any) -> str | None:
    """llama.cpp's name of a config's architecture, or ``None`` if it is not supported."""
    return ARCHITECTURES.get((config.architectures or [""])[0])


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def ropes(config: Any) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Rotary parameters of full attention and, where they differ, of sliding-window layers."""
    rope = config.rope_parameters or {}
    if "full_attention" in rope:
        return rope["full_attention"], rope.get("sliding_attention")
    return rope, None


def unlike_llamacpp(config: Any) -> str | None:
    """What a config requires and llama.cpp's graph does not compute; ``None`` if nothing."""
    arch = architecture(config)
    if arch is None:
        return f"{config.architectures[0]} is not supported; known: {', '.join(ARCHITECTURES)}"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    assumed = "gelu_pytorch_tanh" if arch in WINDOWS else "silu"
    if activation != assumed:
        return f"activation '{activation}'; llama.cpp computes {assumed} for {arch}"
    if arch in ("qwen3", *WINDOWS) and getattr(config, "attention_bias", False):
        return f"llama.cpp's {arch} has no attention biases"
    if arch == "qwen2" and head_dim(config) * config.num_attention_heads != config.hidden_size:
        return f"heads of {head_dim(config)}; llama.cpp's qwen2 takes hidden_size / num_attention_heads"
    if arch == "gemma2" and not config.tie_word_embeddings:
        return "an untied or quantized head; llama.cpp's gemma2 uses the embedding"
    return _rope_unlike(config, arch) or _attention_unlike(config, arch)


def _rope_unlike(config: Any, arch: str) -> str | None:
    full, sliding = ropes(config)
    kind = full.get("rope_type", "default")
    allowed = {"default", "linear", "llama3"} if arch == "llama" else {"default", "linear"}
    if kind not in allowed:
        return f"rope type '{kind}'; supported for {arch}: {', '.join(sorted(allowed))}"
    if (full.get("partial_rotary_factor") or 1.0) != 1.0:
        return "a partial rotary embedding"
    if sliding is not None and (sliding.get("rope_type", "default"), float(sliding["rope_theta"])) != (
        "default",
        10000.0,
    ):
        return f"sliding layers with rope {dict(sliding)}; llama.cpp assumes the base 10000 there"
    return None


def _attention_unlike(config: Any, arch: str) -> str | None:
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if arch not in WINDOWS:
        windowed = getattr(config, "use_sliding_window", arch == "llama") and window is not None
        return f"a sliding window of {window}; llama.cpp's {arch} has none" if windowed else None
    period = WINDOWS[arch]
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    if list(config.layer_types) != expected:
        return f"layer types differ from llama.cpp's for {arch}, where one in {period} has full attention"
    wide = layers == LARGEST[arch]
    scale = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
    if config.query_pre_attn_scalar != scale:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar}; llama.cpp assumes {scale} for this {arch}"
    if arch == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        return "capped attention logits; llama.cpp's gemma3 has none"
    return None


def model_metadata(config: Any, name: str) -> dict[str, Any]:
    """GGUF keys and values that describe the model, except the tokenizer's."""
    arch = architecture(config)
    full, _ = ropes(config)
    dim = head_dim(config)
    facts: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": dim,
        "rope.freq_base": float(full.get("rope_theta", 10000.0)),
    }
    if full.get("rope_type") == "linear":
        facts |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(full["factor"])}
    if arch in WINDOWS:
        facts["attention.sliding_window"] = config.sliding_window
    for key, field in (("attn_logit_softcapping",) * 2, ("final_logit_softcapping",) * 2):
        if (value := getattr(config, field, None)) is not None:
            facts[key] = float(value)
    general = {"general.name": name, "general.quantization_version": 2}
    return general | {f"{arch}.{key}": value for key, value in facts.items()}


def rope_factors(config: Any) -> Tensor | None:
    """Divisors of the rotary frequencies under Llama 3's scaling, float32 ``(head_dim / 2,)``; else ``None``.

    With ``wave = 2 pi / f`` and ``L`` the original context length: 1 where ``wave < L / high``, ``factor`` where
    ``wave > L / low``, and between them ``1 / ((1 - s) / factor + s)`` with ``s = (L / wave - low) / (high - low)``.
    https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (apply_scaling)
    """
    full, _ = ropes(config)
    if full.get("rope_type") != "llama3":
        return None
    factor, low, high = (float(full[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length, dim = float(full["original_max_position_embeddings"]), head_dim(config)
    out = []
    for i in range(dim // 2):
        wave = 2 * math.pi * float(full["rope_theta"]) ** (2 * i / dim)
        smooth = (length / wave - low) / (high - low)
        out.append(
            1.0 if wave < length / high else factor if wave > length / low else 1 / ((1 - smooth) / factor + smooth)
        )
    return torch.tensor(out, dtype=torch.float32)
