"""The text model within a model that has other parts too, such as a vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def text_part(model: Any) -> tuple[str, str] | None:
    """Module paths of a model's text model and of its head; ``None`` if it has no such two modules.

    Args:
        model: the library's model of a composite config.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found = tuple(paths.get(id(one), "") for one in (model.get_decoder(), model.get_output_embeddings()))
    return (found[0], found[1]) if all(found) else None


def remove_outside(model: nn.Module, kept: Sequence[str]) -> None:
    """Take every module and parameter out of a model but some modules, and what leads to them.

    A model computes texts without them. They have no parameters then, and take no memory.

    Args:
        model: changed in place.
        kept: full names of modules.
    """
    for name in [*model._parameters]:
        model._parameters[name] = None
    for name in [*model._buffers]:
        model._buffers[name] = None
    for name, module in list(model.named_children()):
        if name in kept:
            continue
        inner = [path.removeprefix(f"{name}.") for path in kept if path.startswith(f"{name}.")]
        if inner:
            remove_outside(module, inner)
        else:
            setattr(model, name, nn.Identity())
