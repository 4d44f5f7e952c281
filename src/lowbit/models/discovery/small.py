"""Which small model stands for a config: the smallest that runs and has a layer of every form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lowbit.errors import LowbitError
from lowbit.models.discovery.empty import empty_model
from lowbit.models.discovery.kinds import signature
from lowbit.models.discovery.shrink import Layers, shrunk
from lowbit.models.discovery.small_model import SmallModel

MOST_LAYERS = 12  # of a small model


@dataclass(frozen=True)
class Small:
    """The small model of a config.

    Attributes:
        kept: the layers that it keeps.
        config: its config.
        model: the model, in float64 with random parameters.
    """

    kept: Layers
    config: Any
    model: SmallModel


def small_of(config: Any, real: nn.Module | None = None, trust_remote_code: bool = False) -> Small:
    """The small model of a config, with as many layers as it needs.

    Args:
        config: the model's Hugging Face config.
        real: its model without memory (``empty_model``), built here if not given.
        trust_remote_code: run the model's own code.

    Raises:
        LowbitError: no small model can be built, or it does not run.
    """
    real = empty_model(config, trust_remote_code) if real is None else real
    try:
        small = _built(config, real, trust_remote_code, Layers())
    except LowbitError:  # a model may need two layers of a kind, of which one holds what both use
        small = _built(config, real, trust_remote_code, Layers(each=2))
    layers = real.get_submodule(small.model.blocks)
    assert isinstance(layers, nn.ModuleList)
    forms = [signature(layer, sizes=False) for layer in layers]
    known = {signature(layer, sizes=False) for layer in small.model.layers}
    wanted = max((forms.index(form) + 1 for form in set(forms)), default=0)
    if not known.issuperset(forms) and len(known) < wanted <= MOST_LAYERS:
        return _built(config, real, trust_remote_code, Layers(first=wanted))
    return small


def _built(config: Any, real: nn.Module, trusted: bool, kept: Layers) -> Small:
    small = shrunk(config, 0, kept)
    return Small(kept, small, SmallModel(small, real, trusted))
