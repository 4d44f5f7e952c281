"""Whether the library's class loads linears whose weights are packed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import nn


def draws_into_weights(model: Any) -> bool:
    """Whether a class draws initial values into ``weight`` without looking whether a linear has one.

    Loading a packed folder makes it draw for every linear, and a packed linear has codes and scales instead: such a
    class (RecurrentGemma's, RWKV's) does not load one.

    Args:
        model: of a class of the library; it stays as it is.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        bare = nn.Linear(1, 1)
        del bare.weight
        try:
            model._init_weights(bare)
        except AttributeError:
            return True
    return False


def drawn_from_outside(model: Any, layer: nn.Module, linears: Iterable[str]) -> str | None:
    """The class within a layer whose initial values include the weights of some linears; ``None``: there is none.

    Loading a folder in which these are packed makes the library draw those values, and there is no weight.

    Args:
        model: of a class of the library; it stays as it is, and so does ``layer``.
        layer: one of its layers, possibly without memory.
        linears: names of the packed linears in it.
    """
    packed = copy.deepcopy(layer)
    for name in linears:
        own = packed.get_submodule(name)
        if isinstance(own, nn.Linear):
            own._parameters.pop("weight")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for module in packed.modules():
            if isinstance(module, nn.Linear):
                continue  # see ``draws_into_weights``
            try:
                with suppress(NotImplementedError, RuntimeError):  # code that wants values draws nothing on ``meta``
                    model._init_weights(module)
            except AttributeError as error:
                if "weight" in str(error):
                    return type(module).__name__
    return None
