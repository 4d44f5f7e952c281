"""An architecture in GGUF: its name, its metadata, and what llama.cpp takes for granted.

llama.cpp builds the graph from the architecture's name and a few numbers. What it assumes about a family (the layers
with a sliding window, the scale of the attention) is compared with the config here, and a model that differs is
refused: its tensors would be exact, its function would not.

Sources: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp (hyperparameters by architecture),
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (keys).
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_rope import rope_metadata, rope_unlike

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


def unlike_llamacpp(config: Any) -> str | None:
    """What a config requires and llama.cpp's graph does not compute; ``None`` if nothing."""
    arch = architecture(config)
    if arch is None:
        return f"{config.architectures[0]} is not supported; known: {', '.join(ARCHITECTURES)}"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    assumed = "gelu_pytorch_tanh" if arch in WINDOWS else "silu"
    if activation != assumed:
        return f"hidden_act '{activation}'; llama.cpp computes {assumed} for {arch}"
    if arch in ("qwen3", *WINDOWS) and getattr(config, "attention_bias", False):
        return f"attention_bias; llama.cpp's {arch} has no attention biases"
    if arch == "qwen2" and head_dim(config) * config.num_attention_heads != config.hidden_size:
        return f"head_dim {head_dim(config)}; llama.cpp's qwen2 takes hidden_size / num_attention_heads"
    if arch == "gemma2" and not config.tie_word_embeddings:
        return "tie_word_embeddings: an untied or quantized head; llama.cpp's gemma2 uses the embedding"
    return rope_unlike(config, arch) or _attention_unlike(config, arch)


def _attention_unlike(config: Any, arch: str) -> str | None:
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        return "use_bidirectional_attention or is_causal: attention to later tokens; llama.cpp's decoders have none"
    if arch not in WINDOWS:
        windowed = getattr(config, "use_sliding_window", arch == "llama") and window is not None
        return f"sliding_window {window}; llama.cpp's {arch} has none" if windowed else None
    period = WINDOWS[arch]
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    if list(config.layer_types) != expected:
        return f"layer_types differ from llama.cpp's for {arch}, where one in {period} has full attention"
    wide = layers == LARGEST[arch]
    scale = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
    if config.query_pre_attn_scalar != scale:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar}; llama.cpp assumes {scale} for this {arch}"
    if arch == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        return "attn_logit_softcapping; llama.cpp's gemma3 has none"
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if arch == "gemma2" and not getattr(config, field):
            return f"{field} {getattr(config, field)}; llama.cpp's gemma2 always caps: without the key by its default"
    return None


def model_metadata(config: Any, name: str) -> dict[str, Any]:
    """GGUF keys and values that describe the model, except the tokenizer's."""
    arch = architecture(config)
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
        **rope_metadata(config, dim),
    }
    if arch in WINDOWS:
        facts["attention.sliding_window"] = config.sliding_window
    for key, field in (("attn_logit_softcapping",) * 2, ("final_logit_softcapping",) * 2):
        if (value := getattr(config, field, None)) is not None:
            facts[key] = float(value)
    general = {"general.name": name, "general.quantization_version": 2}
    return general | {f"{arch}.{key}": value for key, value in facts.items()}
