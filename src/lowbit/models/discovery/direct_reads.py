"""Linears whose weight other code reads, beside their own ``forward``.

A runtime that packs a linear's weight has no ``weight`` to give: Mamba 2's class reads that of ``out_proj`` when it
draws initial values, which loading a packed folder makes it do, and Mamba multiplies with that of ``dt_proj``. Such a
linear stays float. Where a class draws those of every linear in a layer, as ModernBERT's decoder does, nothing would
be left: they are quantized, and the library's loader makes them dense, see ``runs/stock.py``. The same holds for
linears of a class with a ``forward`` of its own: DeepSeek-V4's grouped one stays float, Falcon's are quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.models.discovery.capture import Call
from lowbit.models.discovery.sites import InFloat64
from lowbit.models.discovery.small_model import SmallModel, with_seed
from lowbit.models.packed import draws_into_weights


class _Watched(nn.Linear):
    """A linear that tells of every look at its weight but that of its own forward."""

    told: Callable[[], None] | None = None  # ``None``: nobody listens

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        return F.linear(input, weight, bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and (told := self.__dict__.get("told")) is not None:
            told()
        return super().__getattr__(name)


def read_directly(small: SmallModel, index: int, call: Call) -> frozenset[str]:
    """Names of the linears in a layer whose weight code outside their own class reads.

    Args:
        small: the model; it stays as it is.
        index: of the layer.
        call: what the layer is called with.
    """
    layer = copy.deepcopy(small.layers[index])
    found: set[str] = set()
    with _watched(layer, found), torch.no_grad(), InFloat64():
        args, kwargs = call.arguments(1)
        layer(*args, **kwargs)
    owner = _owner_of(small)
    if draws_into_weights(owner):  # no linear of it is loaded packed, whoever reads the weight
        return frozenset(found)
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    known = {*found}
    _initialize(owner, layer, found)
    found |= {name for name, module in linears.items() if type(module).forward is not nn.Linear.forward}
    return frozenset(known if found >= linears.keys() else found)


def _owner_of(small: SmallModel) -> Any:
    """The innermost model around the layers: its class has the code that draws their initial values."""
    paths = [small.blocks[:at] for at, letter in enumerate(small.blocks) if letter == "."]
    around = [small.model, *(small.model.get_submodule(path) for path in paths)]
    return [module for module in around if isinstance(module, PreTrainedModel)][-1]


def _initialize(model: Any, layer: nn.Module, found: set[str]) -> None:
    """Draw initial values as the model's class does, module by module; a linear's own are no look from outside."""
    with with_seed(0), torch.no_grad(), _watched(layer, found):
        for name, module in layer.named_modules():
            before = name in found
            try:
                model._init_weights(module)
            except Exception:  # code that wants the whole model draws nothing of a layer alone
                continue
            if isinstance(module, nn.Linear) and not before:
                found.discard(name)


@contextmanager
def _watched(layer: nn.Module, found: set[str]) -> Iterator[None]:
    """Within the context, looks at the weights of plain linears put their names into ``found``."""
    linears = [(name, module) for name, module in layer.named_modules() if type(module) is nn.Linear]
    for name, module in linears:
        module.__class__ = _Watched
        module.__dict__["told"] = _adds(found, name)
    try:
        yield
    finally:
        for _, module in linears:
            del module.__dict__["told"]
            module.__class__ = nn.Linear


def _adds(found: set[str], name: str) -> Callable[[], None]:
    return lambda: found.add(name)
