"""The architecture of a model with other parts: that of its text model, declared by a family or discovered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowbit.errors import LowbitError, one_line, shown
from lowbit.models.architecture import Architecture
from lowbit.models.build import MOST_LAYERS, empty_model, text_config
from lowbit.models.discovery.known import discovered
from lowbit.models.families.family import Family
from lowbit.models.text_part import text_part

_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_UNBUILDABLE = (*_UNREADABLE, AssertionError, ImportError, NameError, OSError, RuntimeError)


def composite_architecture(config: Any, families: Sequence[Family]) -> Architecture:
    """The architecture of a model with a composite config.

    Args:
        config: the Hugging Face config.
        families: those that its text model may be of.

    Raises:
        LowbitError: there is no text model with a head, its structure is not found, or the config says nothing
            sensible of it.
    """
    name, text = config.architectures[0], text_config(config)
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= MOST_LAYERS:
        raise LowbitError(
            f"config.json is invalid: num_hidden_layers is {shown(layers)}; allowed: 1 to {MOST_LAYERS}"
        )
    try:
        model = empty_model(config)
        part = text_part(model)
    except _UNBUILDABLE as error:
        raise LowbitError(
            f"no model can be built from config.json ({type(error).__name__}: {one_line(error)}): fetch it again"
        ) from error
    if part is None:
        raise LowbitError(f"{name} has no text model with a head: choose another model")
    known = {kind: family for family in families for kind in family.text_models}
    family = known.get(type(model.get_decoder()).__name__)
    if family is None:
        return discovered(config).architecture
    try:
        reason = family.refuse(text)
        architecture = family.architecture(text)
    except _UNREADABLE as error:
        raise LowbitError(
            f"config.json is invalid: the attention's shape cannot be read ({one_line(error)}): fetch it again"
        ) from error
    if reason:
        raise LowbitError(reason)
    return architecture.within(*part)
