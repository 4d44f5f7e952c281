"""Which layers of a model are alike: same modules, same flags, same shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

_POSITION = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx", "index")  # of a layer in the model
_PRIVATE = ("training", "call_super_init", "dump_patches")


def signature(layer: nn.Module, sizes: bool = True) -> tuple[Any, ...]:
    """What decides how a layer computes.

    Args:
        layer: a decoder layer, possibly without memory.
        sizes: with shapes and numbers; without, a layer of the small model equals those of the real one that it
            stands for, and numbers count by whether they are 0.
    """
    found: list[Any] = []
    for name, module in layer.named_modules():
        found.append((name, type(module).__name__))
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or key in _POSITION or key in _PRIVATE:
                continue
            if isinstance(value, bool | str):  # None may stand for a state that a pass leaves behind
                found.append((name, key, value))
            elif isinstance(value, int | float):
                found.append((name, key, value if sizes else bool(value)))
        for key, parameter in module.named_parameters(recurse=False):
            found.append((name, key, tuple(parameter.shape) if sizes else parameter.ndim))
    return tuple(found)


def kinds_of(layers: Sequence[nn.Module], sizes: bool = True) -> list[list[int]]:
    """Indices of the layers of each kind, in the order of their first layer."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault(signature(layer, sizes), []).append(index)
    return list(found.values())
