"""Rotary embeddings of a config in GGUF: keys, and tensors of divisors; the reverse of ``checkpoints.gguf_rope``.

========= ========================================================================================================
rope_type in the file
========= ========================================================================================================
default   ``rope.freq_base``
linear    and ``rope.scaling.type``, ``rope.scaling.factor``
yarn      and ``rope.scaling.original_context_length``; ``rope.scaling.attn_factor`` is what the attention factor has
          over ``0.1 ln(factor) + 1``, which llama.cpp multiplies it by
llama3    ``rope_freqs.weight``, by what each frequency is divided
longrope  ``rope_factors_short.weight``, ``rope_factors_long.weight``; ``rope.scaling.attn_factor`` is the whole one
========= ========================================================================================================

Which of them llama.cpp computes depends on the architecture. Its YaRN has fixed ``beta_fast`` and ``beta_slow``.
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-context.cpp
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.gguf_rope import FREQS, LONG, SHORT, llama3_divisors

KINDS = {
    "llama": ("default", "linear", "yarn", "llama3", "longrope"),
    "qwen2": ("default", "linear", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
    "gemma2": ("default", "linear"),
    "gemma3": ("default", "linear"),
}
Rope = Mapping[str, Any]


def ropes(config: Any) -> tuple[Rope, Rope | None]:
    """Rotary parameters of full attention and, where the config has them, of sliding-window layers."""
    rope = config.rope_parameters or {}
    if "full_attention" in rope:
        return rope["full_attention"], rope.get("sliding_attention")
    return rope, None


def rope_unlike(config: Any, arch: str) -> str | None:
    """What the rotary embeddings require and llama.cpp does not compute, by the field's name; else ``None``."""
    full, sliding = ropes(config)
    kind = _kind(full)
    if kind not in KINDS[arch]:
        return f"rope_parameters.rope_type '{kind}'; supported for {arch}: {', '.join(KINDS[arch])}"
    for rope in (full, sliding or {}):
        if (part := rope.get("partial_rotary_factor") or 1.0) != 1.0:
            return f"rope_parameters.partial_rotary_factor {part}; llama.cpp's {arch} rotates whole heads"
    if sliding is not None and _kind(sliding) != "default":
        return (
            f"rope_parameters.sliding_attention of rope_type '{_kind(sliding)}'; llama.cpp scales full attention only"
        )
    return _yarn_unlike(full) if kind == "yarn" else None


def _yarn_unlike(rope: Rope) -> str | None:
    for field, fixed in (("beta_fast", 32.0), ("beta_slow", 1.0), ("truncate", True)):
        if (value := rope.get(field)) is not None and value != fixed:
            return f"rope_parameters.{field} {value}; llama.cpp computes with {fixed}"
    return None


def rope_metadata(config: Any, dim: int) -> dict[str, Any]:
    """Keys without the architecture's name, and their values, for heads of ``dim``."""
    full, sliding = ropes(config)
    kind = _kind(full)
    out: dict[str, Any] = {"rope.dimension_count": dim, "rope.freq_base": float(full.get("rope_theta", 10000.0))}
    if sliding is not None:
        out["rope.freq_base_swa"] = float(sliding["rope_theta"])
    if kind in ("linear", "yarn", "longrope"):
        out["rope.scaling.type"] = kind
    if kind in ("linear", "yarn"):
        out["rope.scaling.factor"] = float(full["factor"])
    if kind in ("yarn", "longrope"):
        out["rope.scaling.original_context_length"] = int(full["original_max_position_embeddings"])
        own = _mscale(float(full["factor"])) if kind == "yarn" else 1.0
        out["rope.scaling.attn_factor"] = attention_factor(config) / own
    return out


def rope_tensors(config: Any, dim: int) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies by the tensor's name, float32 ``(dim / 2,)``; empty where there are none."""
    full, _ = ropes(config)
    if _kind(full) == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values = llama3_divisors(float(full["rope_theta"]), dim, *(float(full[key]) for key in keys))
        return {FREQS: torch.tensor(values, dtype=torch.float32)}
    if _kind(full) == "longrope":
        fields = {SHORT: "short_factor", LONG: "long_factor"}
        return {name: torch.tensor(full[field], dtype=torch.float32) for name, field in fields.items()}
    return {}


def attention_factor(config: Any) -> float:
    """What transformers multiplies cosines and sines by under ``yarn`` and ``longrope``.

    For yarn ``0.1 ln(factor) + 1``, or the quotient of two such with ``mscale`` and ``mscale_all_dim``; for longrope
    ``sqrt(1 + ln(s) / ln(L))`` with ``s`` by how much the context is longer than the original ``L``.
    """
    rope, _ = ropes(config)
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    original = rope["original_max_position_embeddings"]
    factor = float(rope.get("factor") or config.max_position_embeddings / original)
    if _kind(rope) == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return _mscale(factor, above) / _mscale(factor, below) if above and below else _mscale(factor)


def _kind(rope: Rope) -> str:
    return str(rope.get("rope_type", "default"))


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
