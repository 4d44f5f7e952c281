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
propor-   ``rope_freqs.weight``: 1 for the pairs that rotate, and so much for the others that they stand still
tional
========= ========================================================================================================

Which of them llama.cpp computes depends on the architecture; most take YaRN's ``beta_fast`` and ``beta_slow`` to be
32 and 1. Its ramp between the two always begins and ends at whole pairs of dimensions, as ``truncate`` has it.
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-context.cpp
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.checkpoints.gguf_rope import FREQS, LONG, SHORT, llama3_divisors
from lowbit.exporters.gguf_heads import head_dim

if TYPE_CHECKING:
    from lowbit.exporters.gguf_architectures.architecture import Architecture

Rope = Mapping[str, Any]
STILL = 1e30  # a frequency over it is 0 at every position


def ropes(config: Any) -> tuple[Rope, Rope | None]:
    """Rotary parameters of full attention and, where the config has them, of sliding-window layers."""
    rope = config.rope_parameters or {}
    if "full_attention" in rope:
        return rope["full_attention"], rope.get("sliding_attention")
    return rope, None


def rope_unlike(config: Any, arch: Architecture) -> str | None:
    """What the rotary embeddings require and llama.cpp does not compute, by the field's name; else ``None``."""
    full, sliding = ropes(config)
    kind = _kind(full)
    if kind not in arch.ropes:
        return f"rope_parameters.rope_type '{kind}'; supported for {arch.name}: {', '.join(arch.ropes)}"
    # A proportional embedding has a factor that says how many pairs of the whole head rotate.
    for rope in (full if kind != "proportional" else {}, sliding or {}):
        if not arch.partial_rope and (part := rope.get("partial_rotary_factor") or 1.0) != 1.0:
            return f"rope_parameters.partial_rotary_factor {part}; llama.cpp's {arch.name} rotates whole heads"
    if sliding is not None and _kind(sliding) != "default":
        return (
            f"rope_parameters.sliding_attention of rope_type '{_kind(sliding)}'; llama.cpp scales full attention only"
        )
    return _yarn_unlike(full, arch) if kind == "yarn" else None


def _yarn_unlike(rope: Rope, arch: Architecture) -> str | None:
    fixed: dict[str, Any] = {} if arch.yarn_betas else {"beta_fast": 32.0, "beta_slow": 1.0}
    fixed |= {} if arch.any_ramp else {"truncate": True}
    for field, value in fixed.items():
        if (given := rope.get(field)) is not None and given != value:
            return f"rope_parameters.{field} {given}; llama.cpp computes with {value}"
    return None


def ramp_warning(config: Any) -> list[str]:
    """What it changes that YaRN's ramp begins and ends at whole pairs; nothing where the config has that, too."""
    rope, _ = ropes(config)
    if _kind(rope) != "yarn" or rope.get("truncate", True):
        return []
    ours, theirs = (_yarn_frequencies(config, truncate) for truncate in (False, True))
    most = float(((theirs - ours) / ours).abs().max())
    return [
        "rope_parameters.truncate False: llama.cpp's YaRN begins and ends at whole pairs of dimensions, which "
        f"changes a rotary frequency by up to {most:.1%}"
    ]


def _yarn_frequencies(config: Any, truncate: bool) -> Tensor:
    """Rotary frequencies under YaRN, float64 ``(dims / 2,)``: the base's own, those over the factor, and between."""
    rope, _ = ropes(config)
    base, length = float(rope["rope_theta"]), float(rope["original_max_position_embeddings"])
    dims = rotated(config)
    ends = [
        dims * math.log(length / (float(rope.get(key) or default) * 2 * math.pi)) / (2 * math.log(base))
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    ]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else (ends[0], ends[1])
    low, high = max(low, 0), min(high, dims - 1)
    pairs = torch.arange(dims // 2, dtype=torch.float64)
    divided = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return base ** (-2 * pairs / dims) * (divided / float(rope["factor"]) + 1 - divided)


def rotated(config: Any) -> int:
    """Dimensions of a head that rotate."""
    rope, _ = ropes(config)
    return int(head_dim(config) * (rope.get("partial_rotary_factor") or 1.0))


def rope_metadata(config: Any, arch: Architecture) -> dict[str, Any]:
    """Keys without the architecture's name, and their values."""
    full, sliding = ropes(config)
    kind = _kind(full)
    out: dict[str, Any] = {
        "rope.dimension_count": rotated(config),
        "rope.freq_base": float(full.get("rope_theta", 10000.0)),
    }
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
    if kind == "yarn" and arch.yarn_betas:
        out["rope.scaling.yarn_beta_fast"] = float(full.get("beta_fast") or 32.0)
        out["rope.scaling.yarn_beta_slow"] = float(full.get("beta_slow") or 1.0)
    return out


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies by the tensor's name, float32 ``(dims / 2,)``; empty if there are none."""
    full, _ = ropes(config)
    if _kind(full) == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values = llama3_divisors(float(full["rope_theta"]), rotated(config), *(float(full[key]) for key in keys))
        return {FREQS: torch.tensor(values, dtype=torch.float32)}
    if _kind(full) == "longrope":
        fields = {SHORT: "short_factor", LONG: "long_factor"}
        return {name: torch.tensor(full[field], dtype=torch.float32) for name, field in fields.items()}
    if _kind(full) == "proportional":
        return {FREQS: proportional_divisors(full, head_dim(config))}
    return {}


def proportional_divisors(rope: Rope, dim: int) -> Tensor:
    """Divisors of a ``proportional`` embedding over a head of width ``dim``, float32 ``(dim / 2,)``.

    >>> proportional_divisors({"partial_rotary_factor": 0.25}, 16).tolist()[:4]
    [1.0, 1.0, 1.0000000150474662e+30, 1.0000000150474662e+30]
    """
    turning = int((rope.get("partial_rotary_factor") or 1.0) * dim // 2)
    values = [float(rope.get("factor") or 1.0)] * turning + [STILL] * (dim // 2 - turning)
    return torch.tensor(values, dtype=torch.float32)


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
