"""Rotary embeddings of a ``.gguf`` file as transformers' ``rope_parameters``.

With ``i`` the index of a pair of dimensions and ``d`` the rotated dimensions of a head, the frequency is
``base ** (-2 i / d)`` divided by a number, and cosines and sines are multiplied by the attention factor ``a``:

============================ ============================== ====================================================
in the file                  divisor                        in the config
============================ ============================== ====================================================
no scaling                   1                              ``default``
``rope.scaling.type`` linear ``rope.scaling.factor``        ``linear``
``rope.scaling.type`` yarn   between 1 and the factor       ``yarn``; ``a = (0.1 ln factor + 1) attn_factor``
``rope_freqs.weight``        the tensor                     ``llama3`` where its parameters follow from the tensor
``rope_factors_*.weight``    the tensor for short and long  ``longrope``; ``a = attn_factor``
============================ ============================== ====================================================

What has no name of its own (another ``rope_freqs`` tensor, linear scaling with an attention factor) becomes a
``longrope`` whose short and long divisors are the same: transformers computes those as they are given.

``rope.scaling.yarn_attn_factor`` holds the attention factor itself, ``rope.scaling.attn_factor`` what multiplies
llama.cpp's; a file with both is refused. Rejected: guessing what a missing key might have been. llama.cpp falls back
to values that suit some models only.

https://github.com/ggml-org/llama.cpp/blob/master/src/llama-context.cpp (attention factor),
https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.checkpoints.gguf_metadata import Metadata
from lowbit.errors import LowbitError

FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
TABLES = (FREQS, SHORT, LONG)
KINDS = ("none", "linear", "yarn", "longrope")
# Float32 keeps 24 bits of a divisor; recovered parameters must give it back up to the rounding of a few operations.
CLOSE = 2e-6


@dataclass(frozen=True)
class Rope:
    """What an architecture allows.

    Attributes:
        kinds: the types that transformers' class computes as given.
        base: the default of ``rope.freq_base``; ``None`` if converters always write it.
        partial: whether a part of each head may stay as it is.
        tables: the tensors of divisors that llama.cpp reads for it.
    """

    kinds: frozenset[str] = frozenset({"default", "linear", "yarn", "longrope", "llama3"})
    base: float | None = None
    partial: bool = False
    tables: frozenset[str] = frozenset()


def rope_parameters(
    meta: Metadata, rope: Rope, head_dim: int, context: int, tables: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """``rope_parameters`` of the config.

    Args:
        meta: the file's keys.
        rope: what the architecture allows.
        head_dim: width of a head.
        context: positions of the model.
        tables: values of the tensors of divisors that the file has, by the tensor's name.

    Raises:
        LowbitError: keys or tensors that contradict each other, are incomplete, or have no equal in transformers.
    """
    dims = _rotated(meta, rope, head_dim)
    _check_tables(meta, rope, dims, tables)
    out: dict[str, Any] = {"rope_theta": meta.number("rope.freq_base", rope.base)}
    kind, factor = _scaling(meta)
    attention = meta.number("rope.scaling.attn_factor", 1.0)
    if SHORT in tables or LONG in tables:
        out |= _longrope(meta, kind, factor, context, tables)
    elif kind == "longrope":
        raise LowbitError(f"{meta.path} has longrope scaling, but no tensors {SHORT} and {LONG}: fetch it again")
    elif kind == "yarn":
        out |= _yarn(meta, factor, attention, tables)
    else:
        out |= _divided(rope, out["rope_theta"], factor, attention, context, tables.get(FREQS) or [1.0] * (dims // 2))
    _ignore_original_length(meta)
    if out["rope_type"] not in rope.kinds:
        key = "rope.scaling.type" if kind == "yarn" or attention == 1.0 else "rope.scaling.attn_factor"
        raise meta.refusal(key, f"transformers' {meta.architecture} cannot compute it")
    return out | ({"partial_rotary_factor": fraction(dims, head_dim)} if dims != head_dim else {})


def fraction(dims: int, head_dim: int) -> float:
    """The number whose product with ``head_dim`` truncates to ``dims``, as transformers computes it.

    >>> fraction(72, 96)
    0.75
    >>> int(44 * (30 / 44)), int(44 * fraction(30, 44))
    (29, 30)
    """
    value = dims / head_dim
    return value if int(head_dim * value) == dims else math.nextafter(value, 1.0)


def _rotated(meta: Metadata, rope: Rope, head_dim: int) -> int:
    dims = meta.count("rope.dimension_count", head_dim, least=2)
    if dims > head_dim or dims % 2:
        raise meta.refusal("rope.dimension_count", f"allowed are even numbers up to the head's width, {head_dim}")
    if dims != head_dim and not rope.partial:
        raise meta.refusal("rope.dimension_count", f"transformers rotates all {head_dim} dimensions of a head")
    meta.must_equal("rope.dimension_count_swa", dims, "transformers")
    return dims


def _check_tables(meta: Metadata, rope: Rope, dims: int, tables: Mapping[str, Sequence[float]]) -> None:
    for name, values in tables.items():
        if name not in rope.tables and any(v != 1.0 for v in values):
            raise LowbitError(f"{meta.path} has the tensor {name}, which a '{meta.architecture}' does not use")
        if len(values) != dims // 2 or not all(math.isfinite(v) and v > 0 for v in values):
            raise LowbitError(f"{name} in {meta.path} does not hold {dims // 2} positive numbers: fetch it again")


def _scaling(meta: Metadata) -> tuple[str, float]:
    """The declared type and factor; ``rope.scale_linear`` is the linear factor's old name, 0 stands for 1."""
    old, new = (meta.number(key, 0.0, _not_negative) or 1.0 for key in ("rope.scale_linear", "rope.scaling.factor"))
    if meta.has("rope.scale_linear") and meta.has("rope.scaling.factor") and old != new:
        raise meta.refusal("rope.scale_linear", f"it contradicts rope.scaling.factor = {new:g}")
    factor = new if meta.has("rope.scaling.factor") else old
    if not meta.has("rope.scaling.type"):
        if new != 1.0:
            raise meta.refusal("rope.scaling.type", "")
        return "linear", factor
    kind = meta.word("rope.scaling.type", KINDS)
    if kind in ("linear", "yarn") and not (meta.has("rope.scaling.factor") or meta.has("rope.scale_linear")):
        raise meta.refusal("rope.scaling.factor", "")
    return kind, 1.0 if kind == "none" else factor


def _not_negative(value: float) -> bool:
    return value >= 0


def _ignore_original_length(meta: Metadata) -> None:
    """The original length has an effect with YaRN and two tables only; converters write it elsewhere, too."""
    meta.count("rope.scaling.original_context_length", 1)


def _yarn(meta: Metadata, factor: float, attention: float, tables: Mapping[str, Any]) -> dict[str, Any]:
    if tables:
        raise meta.refusal("rope.scaling.type", f"a file with the tensor {min(tables)} cannot scale by yarn, too")
    out: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    out["original_max_position_embeddings"] = meta.count("rope.scaling.original_context_length")
    meta.must_equal("rope.scaling.yarn_ext_factor", 1.0, "transformers", unset=-1.0)
    for key in ("beta_fast", "beta_slow"):
        if meta.has(f"rope.scaling.yarn_{key}"):
            out[key] = meta.number(f"rope.scaling.yarn_{key}")
    if out.get("beta_fast", 32.0) <= out.get("beta_slow", 1.0):
        raise meta.refusal("rope.scaling.yarn_beta_fast", "it must be larger than yarn_beta_slow")
    whole = attention * (0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0)
    if meta.has("rope.scaling.yarn_attn_factor"):
        if attention != 1.0:
            raise meta.refusal("rope.scaling.yarn_attn_factor", "the file has rope.scaling.attn_factor, too")
        out["attention_factor"] = meta.number("rope.scaling.yarn_attn_factor")
    elif attention != 1.0:
        out["attention_factor"] = whole
    return out


def _longrope(
    meta: Metadata, kind: str, factor: float, context: int, tables: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    if set(tables) != {SHORT, LONG}:
        raise LowbitError(f"{meta.path} has the tensors {', '.join(sorted(tables))}: {SHORT} and {LONG} go together")
    if kind == "yarn":
        raise meta.refusal("rope.scaling.type", f"a file with the tensor {SHORT} cannot scale by yarn, too")
    original = meta.count("rope.scaling.original_context_length")
    if context > original and not meta.has("rope.scaling.attn_factor"):
        raise meta.refusal("rope.scaling.attn_factor", "")
    return {
        "rope_type": "longrope",
        "short_factor": [factor * value for value in tables[SHORT]],
        "long_factor": [factor * value for value in tables[LONG]],
        "original_max_position_embeddings": original,
        "attention_factor": meta.number("rope.scaling.attn_factor", 1.0),
    }


def _divided(
    rope: Rope, base: float, factor: float, attention: float, context: int, freqs: Sequence[float]
) -> dict[str, Any]:
    """One divisor for each frequency, by the simplest type that computes them."""
    plain = all(value == 1.0 for value in freqs)
    if attention == 1.0 and plain and factor == 1.0:
        return {"rope_type": "default"}
    if attention == 1.0 and plain and "linear" in rope.kinds:
        return {"rope_type": "linear", "factor": factor}
    if attention == 1.0 and factor == 1.0 and (found := recover_llama3(base, freqs)) is not None:
        return found
    divisors = [factor * value for value in freqs]
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "original_max_position_embeddings": context,
        "attention_factor": attention,
    }


def llama3_divisors(base: float, dims: int, factor: float, low: float, high: float, length: float) -> list[float]:
    """Divisors of the ``dims / 2`` frequencies under Llama 3's scaling.

    With ``wave = 2 pi / f`` and ``L`` the original length: 1 where ``wave < L / high``, ``factor`` where
    ``wave > L / low``, and between them ``1 / ((1 - s) / factor + s)`` with ``s = (L / wave - low) / (high - low)``.

    >>> [round(v, 3) for v in llama3_divisors(1e4, 8, 8.0, 1.0, 4.0, 128.0)]
    [1.0, 2.339, 8.0, 8.0]
    """
    out = []
    for i in range(dims // 2):
        turns = length * base ** (-2 * i / dims) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        out.append(1 / ((1 - smooth) / factor + smooth))
    return out


def recover_llama3(base: float, divisors: Sequence[float]) -> dict[str, Any] | None:
    """The ``llama3`` parameters that give these divisors, or ``None``.

    ``s`` is linear in ``1 / wave``, so the divisors between 1 and the largest one determine ``L / (high - low)`` and
    ``low / (high - low)``. Nothing more enters: ``low`` is set to 1, its value in every published model.
    """
    count, factor = len(divisors), max(divisors)
    waves = 2 * math.pi * base ** (np.arange(count) / count)
    middle = [i for i, value in enumerate(divisors) if 1.0 < value < factor]
    if factor <= 1.0 or not middle:
        return None
    smooth = np.array([(1 / divisors[i] - 1 / factor) / (1 - 1 / factor) for i in middle])
    if len(middle) > 1:
        slope, offset = np.polyfit(1 / waves[middle], smooth, 1)
        guesses = [(1 - 1 / offset, slope / -offset)] if offset < 0 else []
    else:
        guesses = []
    # One divisor leaves a choice, which published models make as high = 4.
    guesses.append((4.0, (smooth[0] * 3 + 1) * waves[middle[0]]))
    for high, length in guesses:
        for digits in (0, 3):
            rounded = max(round(float(high), digits), 1.001), max(round(float(length)), 1)
            got = llama3_divisors(base, 2 * count, factor, 1.0, *rounded)
            if np.allclose(got, divisors, rtol=CLOSE, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": rounded[0],
                    "original_max_position_embeddings": rounded[1],
                }
    return None
