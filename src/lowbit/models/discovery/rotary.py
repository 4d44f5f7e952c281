"""The part of a head that a rotary embedding turns, in a small config: pairs of dimensions, at least one.

Code that rotates a part of each head takes ``int(width * partial_rotary_factor)`` dimensions, which is even at the
model's own width. At a small one it need not be: Phi-2 rotates 0.4 of 80 dimensions, of 8 that is 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
)
FACTOR, ROPE = "partial_rotary_factor", "rope_parameters"
ROTATED = "rotated by"  # start of the name of a number of dimensions
_SMALLEST = 4  # dimensions of a head of which a part can turn
# At both small sizes, by the quarter that the real part lies in; heads there have 16 and 8 dimensions. One pair, as
# of an eighth, would show no stride at the first.
_PARTS = ((3 / 8, 1 / 4), (3 / 8, 1 / 4), (5 / 8, 1 / 2), (5 / 8, 3 / 4))
_FACTORS = (FACTOR, "rotary_pct", "rotary_percent", "rope_pct", "rotary_emb_fraction")  # of a config itself


def lower_rotary(fields: Mapping[str, Any], out: dict[str, Any], size: int) -> None:
    """Lower what a rotary embedding counts: rotated dimensions, and their parts for time, height and width.

    >>> out = {"head_dim": 8, "rope_parameters": {"partial_rotary_factor": 0.4}}
    >>> lower_rotary({**out, "head_dim": 80}, out, 1)
    >>> out["rope_parameters"]  # 2 of 8 dimensions, where 0.4 are 3
    {'partial_rotary_factor': 0.25}

    Args:
        fields: a config's.
        out: the same with smaller heads; changed.
        size: which of the two small sizes.
    """
    for name in _FACTORS:
        if _is_part(out.get(name)):
            out[name] = even_factor(out[name], head_dim(out), size)
    rope = out.get(ROPE)
    if not isinstance(rope, dict):
        return
    if any(isinstance(value, dict) for value in rope.values()):
        out[ROPE] = {
            kind: _lowered(value, _width(fields, kind), _width(out, kind), size) if isinstance(value, dict) else value
            for kind, value in rope.items()
        }
    else:
        out[ROPE] = _lowered(rope, head_dim(fields), head_dim(out), size)


def rotary_numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """How many dimensions of a head turn, by name, of a config that says a part of them: a size like others.

    >>> list(rotary_numbers({"head_dim": 80, "rope_parameters": {"partial_rotary_factor": 0.4}}))
    [('rotated by rope_parameters', 32)]
    """
    rope = fields.get(ROPE)
    named = [(ROPE, rope, head_dim(fields))] if isinstance(rope, dict) else []
    named += [(f"{ROPE}.{k}", one, _width(fields, k)) for k, one in (rope or {}).items() if isinstance(one, dict)]
    for name, one, width in named:
        if _is_part(one.get(FACTOR)):
            yield f"{ROTATED} {name}", int(width * one[FACTOR])


def even_factor(factor: float, width: int, size: int) -> float:
    """A factor near the given one with which an even number of dimensions of a head turns, and not 0.

    Quarters of a head stay. Of other parts the two small sizes take different ones: what is the same at both (the
    part, the dimensions that turn, or those that do not) would be taken for the real one.

    >>> [even_factor(0.5, 16, 0), even_factor(0.5, 8, 1)], [even_factor(0.4, 16, 0), even_factor(0.4, 8, 1)]
    ([0.5, 0.5], [0.375, 0.25])
    """
    if width < _SMALLEST:
        return factor
    part = factor if (4 * factor).is_integer() else _PARTS[int(4 * factor)][size]
    dims = min(max(2 * round(width * part / 2), 2), width)
    return factor if dims == width * factor else dims / width


def head_dim(fields: Mapping[str, Any]) -> int:
    """Width of a head; 0 where the config does not say."""
    heads = next((fields[name] for name in HEADS if _is_size(fields.get(name))), 0)
    hidden, own = fields.get("hidden_size"), fields.get("head_dim")
    if isinstance(own, int) and own > 0:
        return own
    return hidden // heads if isinstance(hidden, int) and heads else 0


def _width(fields: Mapping[str, Any], kind: str) -> int:
    """Width of a head in layers of a kind, which may have one of their own."""
    name = "swa_head_dim" if "sliding" in kind else "global_head_dim"
    own = fields.get(name)
    return own if isinstance(own, int) and _is_size(own) else head_dim(fields)


def _lowered(rope: Mapping[str, Any], before: int, after: int, size: int) -> dict[str, Any]:
    """Parameters of one rotary embedding, of heads of ``before`` dimensions, for heads of ``after``."""
    out = dict(rope)
    if not before or not after:
        return out
    if _is_part(rope.get(FACTOR)) and rope.get("rope_type") != "proportional":  # which turns the others by 0
        out[FACTOR] = even_factor(rope[FACTOR], after, size)
    sections = rope.get("mrope_section")
    if isinstance(sections, list):
        parts = ((after, out.get(FACTOR, 1.0)), (before, rope.get(FACTOR, 1.0)))
        dims = [int(width * part) for width, part in parts if _is_part(part)]
        out["mrope_section"] = smaller(sections, *(dims if len(dims) == 2 and all(dims) else (after, before)))
    return out


def smaller(parts: Sequence[int], numerator: int, denominator: int) -> list[int]:
    """Parts whose sum is a share of what it was.

    >>> smaller([16, 24, 24], 16, 128)
    [2, 3, 3]
    >>> smaller([8, 12, 12], 8, 128)
    [0, 1, 1]
    """
    ends = [round(sum(parts[: at + 1]) * numerator / denominator) for at in range(len(parts))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _is_part(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
