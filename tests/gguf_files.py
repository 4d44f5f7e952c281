"""Writes a transformers model as a ``.gguf`` file, as llama.cpp's converter does, so that tests can read it back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lowbit.checkpoints.gguf_types import SIZES, OwnKind
from tiny import CONFIGS, tiny_ids

ARCHITECTURE = {"gemma3_text": "gemma3", "mistral": "llama"}
# Byte-level characters for ASCII, two merges and the special tokens.
TOKENS = [*(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "he", "Ġw", "<s>", "</s>", "<|endoftext|>"]
TOKENIZER: dict[str, Any] = {
    ".tokenizer.ggml.model": "gpt2",
    ".tokenizer.ggml.pre": "gpt-2",
    ".tokenizer.ggml.tokens": TOKENS,
    ".tokenizer.ggml.token_type": [1] * (len(TOKENS) - 3) + [3] * 3,
    ".tokenizer.ggml.merges": ["h e", "Ġ w"],
    ".tokenizer.ggml.bos_token_id": len(TOKENS) - 3,
    ".tokenizer.ggml.eos_token_id": len(TOKENS) - 2,
    ".tokenizer.ggml.unknown_token_id": len(TOKENS) - 1,
}


def random_model(family: str, **changes: Any) -> Any:
    """A random float32 model whose attention depends on positions; ``changes`` replace the config's arguments."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config = type(config)(**config.to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn_like(p)
            p.copy_(draw * (0.6 if "embed" in name else 1.3 / p.shape[1] ** 0.5) if p.ndim == 2 else p + 0.2 * draw)
    return model


def architecture_of(config: Any) -> str:
    return ARCHITECTURE.get(config.model_type, config.model_type)


def keys_of(config: Any) -> dict[str, Any]:
    """The metadata that the converter writes for a config, but for scaled rotary embeddings; unprefixed."""
    arch = architecture_of(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    out = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if width * config.num_attention_heads != config.hidden_size or arch.startswith("gemma"):
        out |= {"attention.key_length": width, "attention.value_length": width}
    if arch.startswith("gemma"):
        out["attention.sliding_window"] = config.sliding_window
        out |= {
            key: float(value)
            for key in ("attn_logit_softcapping", "final_logit_softcapping")
            if (value := getattr(config, key)) is not None
        }
    if arch == "gemma3":
        out["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if arch == "phi3":
        out["attention.sliding_window"] = config.sliding_window or 0
        out["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    return out


def tensors_of(model: Any) -> dict[str, Any]:
    """Names and float32 arrays as the converter writes them."""
    config, arch = model.config, architecture_of(model.config)
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    out = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = value.detach().float()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if arch in ("llama", "smollm3") and heads:
            value = value.reshape(heads, 2, len(value) // heads // 2, -1).transpose(1, 2).reshape(value.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        out[stored] = value.numpy()
    return out


def write(path: Path, arch: str, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """Write a file.

    Args:
        path: of the file.
        arch: llama.cpp's name of the architecture.
        keys: metadata; those that are ``None`` are left out, those that begin with a dot have no prefix.
        tensors: floats, or rows of blocks with their type; those that are ``None`` are left out.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        full = key[1:] if key.startswith(".") else f"{arch}.{key}"
        if value is not None:
            _add(writer, full, value)
    for name, tensor in tensors.items():
        if tensor is not None:
            data, kind = tensor if isinstance(tensor, tuple) else (np.ascontiguousarray(tensor, np.float32), None)
            shape = None
            if isinstance(kind, OwnKind):  # the package cannot tell the shape from the bytes; int8 is taken as told
                values, size = SIZES[kind]
                shape, data = (len(data), data.shape[1] // size * values), data.view(np.int8)
            writer.add_tensor(name, data, raw_shape=shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int) and value < 0:
        writer.add_int32(key, value)
    elif isinstance(value, int):
        writer.add_uint64(key, value) if value >= 2**32 else writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def save(
    path: Path, model: Any, keys: Mapping[str, Any] | None = None, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write a model with other keys (``None`` removes one) and other tensors."""
    arch = architecture_of(model.config)
    return write(path, arch, keys_of(model.config) | dict(keys or {}), tensors_of(model) | dict(extra or {}))


def logits(model: Any, tokens: int = 100) -> torch.Tensor:
    """Logits of one text, float32 ``(tokens, vocabulary)``."""
    ids = tiny_ids(1, tokens)
    with torch.no_grad():
        return model(ids).logits[0]
