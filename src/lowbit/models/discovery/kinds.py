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
            stands for: numbers count by whether they are 0, and a list of equal modules, such as experts, by one.
    """
    found: list[Any] = []
    alike = () if sizes else _repeated(layer)
    for name, module in layer.named_modules():
        if f"{name}.".startswith(alike):
            continue
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


def _repeated(layer: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of modules that are like the first of their list."""
    lists = [(name, own) for name, own in layer.named_modules() if isinstance(own, nn.ModuleList) and len(own) > 1]
    return tuple(
        f"{name}.{at}."
        for name, own in lists
        for at in range(1, len(own))
        if type(own[at]) is type(own[0]) and _flags(own[at]) == _flags(own[0])
    )


def _flags(module: nn.Module) -> list[Any]:
    return [
        (name, type(own).__name__, sorted((k, v) for k, v in vars(own).items() if isinstance(v, bool | str)))
        for name, own in module.named_modules()
    ]


def kinds_of(layers: Sequence[nn.Module], sizes: bool = True) -> list[list[int]]:
    """Indices of the layers of each kind, in the order of their first layer."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault(signature(layer, sizes), []).append(index)
    return list(found.values())
