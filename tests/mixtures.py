"""Tiny mixtures of experts for tests: the declared ones and those written down by hand."""

from __future__ import annotations

from typing import Any

import handmade
import tiny
from lowbit.models import families

NAMES = (*tiny.MIXTURES, *handmade.MIXTURES)


def declare(monkeypatch: Any) -> None:
    """Make the mixtures by hand known to the package and to ``tiny_model``."""
    monkeypatch.setattr(
        families, "FAMILIES", (*families.FAMILIES, *(handmade.FAMILIES[n] for n in handmade.MIXTURES))
    )
    for name in handmade.MIXTURES:
        monkeypatch.setitem(tiny.CONFIGS, name, handmade.CONFIGS[name])


def tiny_mixture(name: str, **changes: Any) -> Any:
    """A tiny mixture that runs one expert after the other, as lowbit does."""
    model = tiny.tiny_model(name, **changes)
    model.set_experts_implementation("eager")
    return model


def shun_the_last(model: Any) -> None:
    """Change the routers of a mixture of five experts, two of which a token reaches, so that none reaches the last.

    Rows of the router are ``w, -w, u, -u, 0``: two of the first four logits are above that of the last.
    """
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            weight = layer.mlp.gate.weight.data
            assert len(weight) == 5
            weight[1], weight[3], weight[4] = -weight[0], -weight[2], 0


def with_a_cold_expert(name: str) -> Any:
    """A tiny mixture of five experts, the last of which no token reaches."""
    counts = {"mixtral": "num_local_experts"}
    model = tiny_mixture(name, **{counts.get(name, "num_experts"): 5})
    shun_the_last(model)
    return model
