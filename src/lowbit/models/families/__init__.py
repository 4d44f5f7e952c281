"""The declared architectures: one value each, looked up by ``config.architectures``; others are discovered."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoModelForCausalLM

from lowbit.errors import LowbitError, one_line, shown, unknown
from lowbit.models.architecture import Architecture
from lowbit.models.build import built_class, is_composite
from lowbit.models.discovery.known import discovered
from lowbit.models.families.composite import composite_architecture
from lowbit.models.families.family import Family
from lowbit.models.families.gemma import GEMMA2, GEMMA3
from lowbit.models.families.llama import LLAMA
from lowbit.models.families.mixtures import MIXTRAL, QWEN3_MOE
from lowbit.models.families.opt import OPT
from lowbit.models.families.phi import PHI3
from lowbit.models.families.qwen import QWEN2, QWEN3
from lowbit.models.families.smollm3 import SMOLLM3

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OPT, SMOLLM3, MIXTRAL, QWEN3_MOE)
MOST_LAYERS = 4096  # an entry each: a config may say anything


def family_of(config: Any) -> Family | None:
    """The family of a Hugging Face config; ``None`` for an architecture that none declares."""
    name = _named(config)
    family = next((family for family in FAMILIES if name in family.architectures), None)
    _check_built_class(config, name, family)
    if family is None:
        return None
    try:
        reason = family.refuse(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(error) from error
    if reason:
        raise LowbitError(reason)
    return family


def _named(config: Any) -> str:
    names = getattr(config, "architectures", None)
    if not isinstance(names, list) or not names:
        raise LowbitError("config.json names no architecture: add 'architectures', for example ['LlamaForCausalLM']")
    if not isinstance(names[0], str):
        raise unknown("architecture", shown(names[0]), _declared())
    return names[0]


def _declared() -> list[str]:
    return [name for family in FAMILIES for name in family.architectures]


def _check_built_class(config: Any, name: str, family: Family | None) -> None:
    """Refuse a config of whose ``model_type`` transformers builds another class than ``architectures`` names."""
    mapping = AutoModelForCausalLM._model_mapping
    if not type(config).__module__.startswith("transformers."):
        return  # of the model's own code
    if type(config) not in mapping:
        if family is None:
            raise LowbitError(
                f"{name} is no causal language model of transformers {transformers.__version__}: give one, such as "
                f"{', '.join(_declared()[:3])}, or update transformers"
            )
        return
    found = mapping[type(config)]
    built = found.__name__
    if found.__module__.startswith("transformers.") and built not in (family.architectures if family else (name,)):
        raise LowbitError(
            f"config.json names the architecture {name}, its model_type {config.model_type!r} is that of {built}: "
            "they do not match"
        )


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model with a Hugging Face config, whose number of layers must be sound.

    It is that of the declared family, or else discovered.

    Raises:
        LowbitError: the config is of no causal language model, says nothing sensible of its layers, or its structure
            is not found.
    """
    if is_composite(config) and built_class(config) in (getattr(config, "architectures", None) or ()):
        return composite_architecture(config, FAMILIES)
    family, layers = family_of(config), getattr(config, "num_hidden_layers", None)
    if isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= MOST_LAYERS:
        raise LowbitError(
            f"config.json is invalid: num_hidden_layers is {shown(layers)}; allowed: 1 to {MOST_LAYERS}"
        )
    if family is None:
        return discovered(config).architecture
    try:
        return family.architecture(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> LowbitError:
    return LowbitError(
        f"config.json is invalid: the attention's shape cannot be read ({one_line(error)}): fetch it again"
    )
