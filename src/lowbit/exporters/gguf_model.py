"""A config in GGUF: its keys, and what of it llama.cpp's graph does not compute; see ``gguf_architectures``.

Sources: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp (hyperparameters that all have),
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (keys).
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures import ARCHITECTURES, architecture_of
from lowbit.exporters.gguf_architectures.architecture import Architecture, Facts
from lowbit.exporters.gguf_architectures.text_models import CHECKED
from lowbit.exporters.gguf_heads import head_dim, kv_heads
from lowbit.exporters.gguf_rope import rope_metadata, rope_unlike


def architecture(config: Any) -> Architecture:
    """The architecture of a config that ``unlike_llamacpp`` has nothing against."""
    found = architecture_of(config)
    assert found is not None, "a model of an unknown architecture is refused before anything is written"
    return found


def unlike_llamacpp(config: Any) -> str | None:
    """What a config requires and llama.cpp's graph does not compute; ``None`` if nothing."""
    arch = architecture_of(config)
    if arch is None:
        return f"{config.architectures[0]} is not supported; known: {', '.join((*ARCHITECTURES, *CHECKED))}"
    # "vision": among the tokens of an image, which a text has none of.
    both = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
    if both or getattr(config, "is_causal", True) is False:
        return "use_bidirectional_attention or is_causal: attention to later tokens; llama.cpp's decoders have none"
    return (
        _activation_unlike(config, arch)
        or _sizes_unlike(config, arch)
        or rope_unlike(config, arch)
        or arch.unlike(config)
    )


def _activation_unlike(config: Any, arch: Architecture) -> str | None:
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    if arch.activation and activation != arch.activation:
        return f"hidden_act '{activation}'; llama.cpp computes {arch.activation} for {arch.name}"
    return None


def _sizes_unlike(config: Any, arch: Architecture) -> str | None:
    if arch.square and head_dim(config) * config.num_attention_heads != config.hidden_size:
        return f"head_dim {head_dim(config)}; llama.cpp's {arch.name} takes hidden_size / num_attention_heads"
    if arch.head == "tied" and not config.tie_word_embeddings:
        return f"tie_word_embeddings: an untied or quantized head; llama.cpp's {arch.name} uses the embedding"
    if arch.head == "own" and config.tie_word_embeddings:
        return f"tie_word_embeddings: the head is the embedding; llama.cpp's {arch.name} needs one of its own"
    return None


def model_metadata(config: Any, name: str) -> Facts:
    """GGUF keys and values that describe the model, except the tokenizer's."""
    arch = architecture(config)
    field, epsilon = arch.epsilon
    facts: Facts = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads(config),
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        epsilon: float(getattr(config, field)),
        **rope_metadata(config, arch),
        **arch.facts(config),
    }
    general = {"general.name": name, "general.quantization_version": 2}
    return general | {f"{arch.name}.{key}": value for key, value in facts.items() if value is not None}
