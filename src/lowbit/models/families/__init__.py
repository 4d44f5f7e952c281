"""The declared architectures: one value each, looked up by ``config.architectures``."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from lowbit.errors import LowbitError, one_line, shown, unknown
from lowbit.models.architecture import Architecture
from lowbit.models.build import built_class, is_composite
from lowbit.models.families.composite import composite_architecture
from lowbit.models.families.family import Family
from lowbit.models.families.gemma import GEMMA2, GEMMA3
from lowbit.models.families.llama import LLAMA
from lowbit.models.families.opt import OPT
from lowbit.models.families.phi import PHI3
from lowbit.models.families.qwen import QWEN2, QWEN3
from lowbit.models.families.smollm3 import SMOLLM3

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OPT, SMOLLM3)
MOST_LAYERS = 4096  # an entry each: a config may say anything


def _check_built_class(config: Any, family: Family) -> None:
    """Refuse a config of whose ``model_type`` transformers builds another class than ``architectures`` names."""
    mapping = AutoModelForCausalLM._model_mapping
    if not type(config).__module__.startswith("transformers.") or type(config) not in mapping:
        return  # of the model's own code
    found = mapping[type(config)]
    built = found.__name__
    if found.__module__.startswith("transformers.") and built not in family.architectures:
        raise LowbitError(
            f"config.json names the architecture {config.architectures[0]}, its model_type {config.model_type!r} is "
            f"that of {built}: they do not match"
        )


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config; there is no default for an architecture that is not listed."""
    names = getattr(config, "architectures", None)
    if not isinstance(names, list) or not names:
        raise LowbitError("config.json names no architecture: add 'architectures', for example ['LlamaForCausalLM']")
    family = next((family for family in FAMILIES if names[0] in family.architectures), None)
    if family is None:
        name = names[0] if isinstance(names[0], str) else shown(names[0])
        raise unknown("architecture", name, [name for family in FAMILIES for name in family.architectures])
    _check_built_class(config, family)
    try:
        reason = family.refuse(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(error) from error
    if reason:
        raise LowbitError(reason)
    return family


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model with a Hugging Face config, whose number of layers must be sound.

    Raises:
        LowbitError: the config is of no known architecture, or says nothing sensible of its layers.
    """
    if is_composite(config) and built_class(config) in (getattr(config, "architectures", None) or ()):
        return composite_architecture(config, FAMILIES)
    family, layers = family_of(config), getattr(config, "num_hidden_layers", None)
    if isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= MOST_LAYERS:
        raise LowbitError(
            f"config.json is invalid: num_hidden_layers is {shown(layers)}; allowed: 1 to {MOST_LAYERS}"
        )
    try:
        return family.architecture(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> LowbitError:
    return LowbitError(
        f"config.json is invalid: the attention's shape cannot be read ({one_line(error)}): fetch it again"
    )
