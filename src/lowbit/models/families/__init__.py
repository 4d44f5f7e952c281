"""The declared architectures: one value each, looked up by ``config.architectures`` or a text model's class."""

from __future__ import annotations

from typing import Any

from lowbit.errors import LowbitError, one_line, shown, unknown
from lowbit.models.architecture import Architecture
from lowbit.models.build import MOST_LAYERS, built_class, empty_model, is_composite, text_config
from lowbit.models.families.family import Family
from lowbit.models.families.gemma import GEMMA2, GEMMA3
from lowbit.models.families.llama import LLAMA
from lowbit.models.families.opt import OPT
from lowbit.models.families.phi import PHI3
from lowbit.models.families.qwen import QWEN2, QWEN3
from lowbit.models.families.smollm3 import SMOLLM3

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OPT, SMOLLM3)
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _check_built_class(config: Any, family: Family) -> None:
    """Refuse a config of whose ``model_type`` transformers builds another class than ``architectures`` names."""
    built = built_class(config)
    if built is not None and built not in family.architectures:
        raise LowbitError(
            f"config.json names the architecture {config.architectures[0]}, its model_type {config.model_type!r} is "
            f"that of {built}: they do not match"
        )


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config; there is no default for an architecture that is not listed."""
    names = getattr(config, "architectures", None)
    if not isinstance(names, list) or not names:
        raise LowbitError("config.json names no architecture: add 'architectures', for example ['LlamaForCausalLM']")
    name = names[0] if isinstance(names[0], str) else shown(names[0])
    if is_composite(config) and built_class(config) == name:
        family = _family_of_text_model(config, name)
    else:
        known = {name: family for family in FAMILIES for name in family.architectures}
        if name not in known:
            raise unknown("architecture", name, known)
        family = known[name]
        _check_built_class(config, family)
    try:
        reason = family.refuse(text_config(config))
    except _UNREADABLE as error:
        raise _unreadable(error) from error
    if reason:
        raise LowbitError(reason)
    return family


def _family_of_text_model(config: Any, name: str) -> Family:
    """The family of the text model in a model with other parts."""
    kind = type(_text_model(config)).__name__
    known = {name: family for family in FAMILIES for name in family.text_models}
    if kind not in known:
        raise LowbitError(
            f"the text model of {name} is a {kind}; known are: {', '.join(known)}: choose another model"
        )
    return known[kind]


def _text_model(config: Any) -> Any:
    """The text model of a composite config's model, on ``meta``."""
    try:
        return empty_model(config).get_decoder()
    except (*_UNREADABLE, AssertionError, ImportError, NameError, OSError, RuntimeError) as error:
        raise LowbitError(
            f"no model can be built from config.json ({type(error).__name__}: {one_line(error)}): fetch it again"
        ) from error


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model with a Hugging Face config, whose number of layers must be sound.

    Raises:
        LowbitError: the config is of no known architecture, or says nothing sensible of its layers.
    """
    layers = getattr(text_config(config), "num_hidden_layers", None)
    if is_composite(config):
        _check_layers(layers)
    family = family_of(config)
    _check_layers(layers)
    try:
        architecture = family.architecture(text_config(config))
    except _UNREADABLE as error:
        raise _unreadable(error) from error
    if not is_composite(config):
        return architecture
    model = empty_model(config)
    names = {id(module): name for name, module in model.named_modules()}
    head, text_model = model.get_output_embeddings(), model.get_decoder()
    if id(head) not in names or id(text_model) not in names:
        raise LowbitError(f"{config.architectures[0]} has no text model with a head: choose another model")
    return architecture.within(names[id(text_model)], names[id(head)])


def _check_layers(layers: Any) -> None:
    if isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= MOST_LAYERS:
        raise LowbitError(
            f"config.json is invalid: num_hidden_layers is {shown(layers)}; allowed: 1 to {MOST_LAYERS}"
        )


def _unreadable(error: Exception) -> LowbitError:
    return LowbitError(
        f"config.json is invalid: the attention's shape cannot be read ({one_line(error)}): fetch it again"
    )
