"""Whether the library's class loads linears whose weights are packed."""

from __future__ import annotations

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
