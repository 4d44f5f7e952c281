"""Tiny mixtures of experts for tests: the declared ones and those written down by hand."""

from __future__ import annotations

from typing import Any

import handmade
import tiny
from lowbit.models import families

NAMES = (*tiny.MIXTURES, *handmade.MIXTURES)


def declare(monkeypatch: Any) -> None:
    """Make the mixtures by hand known to the package and to ``tiny_model``."""
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, *(handmade.FAMILIES[n] for n in handmade.MIXTURES)))
    for name in handmade.MIXTURES:
        monkeypatch.setitem(tiny.CONFIGS, name, handmade.CONFIGS[name])


def tiny_mixture(name: str, **changes: Any) -> Any:
    """A tiny mixture that runs one expert after the other, as lowbit does."""
    model = tiny.tiny_model(name, **changes)
    model.set_experts_implementation("eager")
    return model


def favour(model: Any, layer: int, expert: int, by: float) -> None:
    """Change the router of a layer so that an expert is chosen more (``by`` above 1) or less."""
    mlp = model.model.layers[layer].mlp
    router = mlp.router if hasattr(mlp, "router") else mlp.gate
    router.weight.data[expert] *= by
