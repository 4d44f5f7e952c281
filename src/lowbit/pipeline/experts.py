"""Mixtures of experts that no family declares: refused, so that no expert stays float without a word."""

from __future__ import annotations

from typing import Any

from lowbit.errors import LowbitError
from lowbit.models.discovery.known import discovered
from lowbit.models.families import architecture_of


def refuse_experts(config: Any) -> None:
    """Refuse a model of which discovery finds layers with experts; declared families know theirs.

    Raises:
        LowbitError: it has experts, or as ``architecture_of``.
    """
    if architecture_of(config).origin != "discovered":
        return
    names = dict.fromkeys(name for own in discovered(config).record.experts for name in own)
    if names:
        raise LowbitError(
            f"{config.architectures[0]} is a mixture of experts of no declared family, and its experts "
            f"({', '.join(names)}) are not quantized: give a dense model, or a mixture of a declared family"
        )
