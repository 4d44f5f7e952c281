"""How many tokens a model's positions allow."""

from __future__ import annotations

from typing import Any

# The first that a config has counts; most others are mapped to it. MPT: tokens of its table of biases.
_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


def positions_of(config: Any) -> int | None:
    """The most tokens of a text by a text model's config; ``None`` where it names no limit.

    Models without an embedding of positions have no such field, or -1 or 0 in it.

    >>> from types import SimpleNamespace
    >>> [positions_of(SimpleNamespace(max_position_embeddings=n)) for n in (2048, -1)], positions_of(object())
    ([2048, None], None)
    >>> positions_of(SimpleNamespace(max_seq_len=2048))
    2048
    """
    limit = next((found for name in _FIELDS if (found := getattr(config, name, None)) is not None), None)
    return int(limit) if limit and limit > 0 else None
