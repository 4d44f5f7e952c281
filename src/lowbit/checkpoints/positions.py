"""How many tokens a model's positions allow."""

from __future__ import annotations

from typing import Any


def positions_of(config: Any) -> int | None:
    """The most tokens of a text by a text model's config; ``None`` where it names no limit.

    Models without an embedding of positions have no such field, or -1 or 0 in it.

    >>> from types import SimpleNamespace
    >>> [positions_of(SimpleNamespace(max_position_embeddings=n)) for n in (2048, -1)], positions_of(object())
    ([2048, None], None)
    """
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit and limit > 0 else None
