"""The linears that read what a runtime op gives."""

from __future__ import annotations

from lowbit.models.architecture import Architecture, module_of
from lowbit.models.runtime_ops import linear_behind


def linears_at(architecture: Architecture, place: str) -> list[str]:
    """Full names of the linears behind an op on a linear's input, or behind a norm; none for any other place."""
    if (linear := linear_behind(place)) is not None:
        return [linear]
    for index, kind in enumerate(architecture.layers):
        prefix = f"{architecture.blocks}.{index}."
        edges = [edge for edge in kind.edges if edge.kind == "norm" and prefix + module_of(edge.src) == place]
        if found := dict.fromkeys(prefix + module_of(reader) for edge in edges for reader in edge.dst):
            return list(found)
    return []
