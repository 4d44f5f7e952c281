"""The declared architectures: one value each, looked up by ``config.architectures``."""

from __future__ import annotations

from typing import Any

from lowbit.errors import LowbitError, unknown
from lowbit.models.architecture import Family, check_heads
from lowbit.models.families.gemma import GEMMA2, GEMMA3
from lowbit.models.families.llama import LLAMA
from lowbit.models.families.opt import OPT
from lowbit.models.families.phi import PHI3
from lowbit.models.families.qwen import QWEN2, QWEN3
from lowbit.models.families.smollm3 import SMOLLM3

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OPT, SMOLLM3)


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config; there is no default for an architecture that is not listed."""
    names = getattr(config, "architectures", None)
    if not isinstance(names, list) or not names:
        raise LowbitError("config.json names no architecture: add 'architectures', for example ['LlamaForCausalLM']")
    for family in FAMILIES:
        if names[0] in family.architectures:
            if reason := family.refuse(config):
                raise LowbitError(reason)
            check_heads(family.heads(config))
            return family
    raise unknown("architecture", names[0], [name for family in FAMILIES for name in family.architectures])
