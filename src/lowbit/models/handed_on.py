"""What layers hand to later ones in an argument, found by running them on ``meta``, where nothing is computed.

An argument that all layers get, a mapping that is empty at first, is how a model lets a layer use the keys and values
of an earlier one. Who writes and who reads it shows which layers' streams have to carry what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lowbit.errors import LowbitError, one_line
from lowbit.models.stream import Form, Handed, Noted, form_of

Arguments = Sequence[tuple[Tensor, Mapping[str, Any]]]  # by layer: hidden states and keyword arguments


def mappings_in(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that are empty mappings, into which a layer may write."""
    return [name for name, value in arguments.items() if isinstance(value, MutableMapping) and not value]


@dataclass(frozen=True)
class _Use:
    """What one layer does with an argument: keys that it reads and writes, and the mapping after it."""

    read: set[str]
    written: set[str]
    after: Mapping[str, Any]


def handed_on(layers: Sequence[nn.Module], one: Arguments, two: Arguments, shorter: Arguments) -> list[list[Handed]]:
    """What goes into each layer, and out of the last, beside hidden states: only what a later layer reads.

    Args:
        layers: the library's, possibly without memory.
        one, two, shorter: what the model calls them with, for one sequence, for two, and for one of fewer tokens.

    Raises:
        LowbitError: something is handed on that has no dimensions for sequences and tokens.
    """
    names = mappings_in(one[0][1])
    if not names:
        return [[] for _ in range(len(layers) + 1)]
    try:
        passes = [_pass(layers, arguments, names) for arguments in (one, two, shorter)]
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise LowbitError(f"the layers use '{names[0]}' in a way that is not seen ({one_line(error)})") from error
    out: list[list[Handed]] = []
    for place in range(len(layers) + 1):
        out.append([])
        for name in names:
            for key in _alive(passes[0], name, place):
                values = [uses[place - 1][name].after[key] for uses in passes]
                out[-1].append(_described(name, key, values, place - 1))
    return out


def _pass(layers: Sequence[nn.Module], arguments: Arguments, names: Sequence[str]) -> list[dict[str, _Use]]:
    """What each layer does with the arguments ``names``."""
    mappings = {name: Noted() for name in names}
    out = []
    for layer, (hidden, kwargs) in zip(layers, arguments, strict=True):
        for mapping in mappings.values():
            mapping.read, mapping.written = set(), set()
        given = {name: value for name, value in kwargs.items() if name not in mappings}
        on_meta = tree_map_only(Tensor, lambda value: value.to("meta"), given)
        state = {name: value.to("meta") for name, value in layer.state_dict().items()}
        state |= {name: value.to("meta") for name, value in layer.named_buffers()}
        with torch.no_grad(), _experts_on_meta(layer):
            torch.func.functional_call(layer, state, args=(hidden.to("meta"),), kwargs={**on_meta, **mappings})
        out.append({name: _Use(own.read, own.written, dict(own)) for name, own in mappings.items()})
    return out


@contextmanager
def _experts_on_meta(layer: nn.Module) -> Iterator[None]:
    """Run experts by a function that takes every dtype on ``meta``, where the library's own choice takes bfloat16."""
    configs = {id(config): config for module in layer.modules() if (config := getattr(module, "config", None))}
    before = [(config, getattr(config, "_experts_implementation", None)) for config in configs.values()]
    try:
        for config, name in before:
            if name is not None:
                config._experts_implementation = "batched_mm"
        yield
    finally:
        for config, name in before:
            if name is not None:
                config._experts_implementation = name


def _alive(uses: Sequence[Mapping[str, _Use]], name: str, place: int) -> list[str]:
    """Keys that are written in front of a layer, and read there or behind it before they are written anew."""
    keys = dict.fromkeys(key for use in uses[:place] for key in sorted(use[name].written))
    out = []
    for key in keys:
        later = [use[name] for use in uses[place:] if key in use[name].read | use[name].written]
        if later and key in later[0].read:
            out.append(key)
    return out


def _described(argument: str, key: str, values: Sequence[Any], layer: int) -> Handed:
    forms: list[Form | None] = []
    if all(isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value) for value in values):
        forms = [form_of(*parts) for parts in zip(*values, strict=True)]
    found = tuple(form for form in forms if form is not None)
    if not found or len(found) < len(forms):
        raise LowbitError(f"layer {layer} hands '{argument}' to later layers in a form without sequences and tokens")
    widths = tuple(form.flat(value).shape[-1] for form, value in zip(found, values[0], strict=True))
    return Handed(argument, key, found, widths)
