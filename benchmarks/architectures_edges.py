"""The edges of a kind of layers in one line of the page, from the counts that a row keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lowbit.models.build import text_config

_COUNTED = re.compile(r"(?P<kind>\w+) ?(?P<rest>.*?)(?: x (?P<count>\d+))?")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
FEWEST = 4  # experts of a mixture, of which no norm of a dense layer has as many readers


def experts_in(config: Any) -> int:
    """How many experts a config's layers with experts have; 0: none, or a number of its own for each layer."""
    text = text_config(config)
    found = (getattr(text, name, None) for name in _EXPERTS)
    return next((count for count in found if isinstance(count, int) and count >= FEWEST), 0)


def sentence(edges: Sequence[str], experts: int = 0) -> str:
    """The edges of a layer as people read them: those that every expert has are said once.

    >>> sentence(["norm 3", "heads matrix", "channels diagonal", "qk matrix 64 pairs"])
    'norm -> 3 linears; v -> o (matrix); channels (diagonal); q -> k (matrix, 64 pairs)'
    >>> sentence(["norm 515", "channels diagonal x 257"], 256)
    'norm -> 3 linears and 2 of each expert; channels (diagonal); per expert: up -> down (diagonal)'

    Args:
        edges: as a row has them, with counts.
        experts: how many a layer with experts has; whether this one has any shows in the counts.
    """
    found = [match.group("kind", "rest", "count") for one in edges if (match := _COUNTED.fullmatch(one))]
    counted = [(kind, rest, int(count or 1)) for kind, rest, count in found]
    mixture = experts if experts and any(_of_experts(one, experts) for one in counted) else 0
    parts, each = [], []
    for kind, rest, count in counted:
        if kind == "channels" and mixture and count >= mixture:
            each.append(f"per expert: up -> down ({_limit(rest)})")
            count -= mixture
        if count:
            parts.append(_said(kind, rest, count, mixture))
    return "; ".join([*parts, *each]) or "none"


def _of_experts(edge: tuple[str, str, int], experts: int) -> bool:
    """Whether a count is one that experts make: an edge for each, or a norm that gate and up of each read."""
    kind, rest, count = edge
    return (kind == "channels" and count >= experts) or (kind == "norm" and int(rest) >= 2 * experts)


def _said(kind: str, rest: str, count: int, experts: int) -> str:
    times = f"{count} x " if count > 1 else ""
    if kind == "norm":
        return f"{times}norm -> {_readers(int(rest), experts)}"
    name = {"heads": "v -> o", "qk": "q -> k"}.get(kind, kind)
    return f"{times}{name} ({_limit(rest)})"


def _readers(count: int, experts: int) -> str:
    """A norm's readers: a layer's own linears, and those that each expert has.

    >>> _readers(1, 0), _readers(257, 128)
    ('1 linear', '1 linear and 2 of each expert')
    """
    of_each, own = divmod(count, experts) if experts else (0, count)
    linears = f"{own} linear{'s' if own != 1 else ''}"
    return f"{linears} and {of_each} of each expert" if of_each else linears


def _limit(rest: str) -> str:
    """The largest group of maps, and what it counts.

    >>> _limit("positive power 2"), _limit("matrix 8 pairs 4 free")
    ('positive, power 2', 'matrix, 8 pairs, 4 free')
    """
    return re.sub(r" (power \d+|\d+ \w+)", r", \1", rest)
