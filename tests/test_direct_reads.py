"""Linears whose weight other code reads stay float, by name; classes that load nothing packed are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from decoders import CONFIGS, SIZES
from lowbit.models.discovery import discover
from lowbit.models.discovery.capture import Call
from lowbit.models.discovery.direct_reads import read_directly
from lowbit.models.packed import draws_into_weights


class Layer(nn.Module):
    """One linear is called, one multiplies by hand, of one the dtype is asked, one is drawn from outside."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "by_hand", "asked", "drawn"):
            setattr(self, name, nn.Linear(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x) @ self.by_hand.weight
        return self.drawn(self.asked(x.to(self.asked.weight.dtype)))


def small(draw: Any) -> tuple[Any, Call]:
    """What ``read_directly`` takes of a model with one such layer, and the layer's call."""

    class Model(PreTrainedModel):
        config_class = CONFIG_MAPPING["llama"]

        def __init__(self) -> None:
            super().__init__(CONFIG_MAPPING["llama"](**SIZES))
            self.layers = nn.ModuleList([Layer()])

        def _init_weights(self, module: nn.Module) -> None:
            draw(super()._init_weights, module)

    model, x = Model(), torch.randn(1, 3, 4, dtype=torch.float64)
    call = Call((x,), {}, ((torch.cat([x, x]),), {}))
    return SimpleNamespace(model=model, blocks="layers", layers=list(model.layers)), call


def draws_one(base: Any, module: nn.Module) -> None:
    """Initial values of a class that draws one linear's again from outside."""
    base(module)
    if isinstance(module, Layer):
        nn.init.normal_(module.drawn.weight)


def draws_all(base: Any, module: nn.Module) -> None:
    """Initial values of a class that takes every linear to have a weight."""
    draws_one(base, module)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight)


def test_reads_from_outside_are_found_and_the_layer_stays_as_it_is():
    model, call = small(draws_one)
    layer = model.layers[0]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    state = torch.get_rng_state()
    assert read_directly(model, 0, call) == {"by_hand", "asked", "drawn"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(type(module) is nn.Linear for module in layer.children())


def test_a_class_that_draws_into_every_weight_loads_nothing_packed_whoever_reads_it():
    model, call = small(draws_all)
    assert draws_into_weights(model.model)
    assert not draws_into_weights(small(draws_one)[0].model)
    assert read_directly(model, 0, call) == {"by_hand", "asked"}


@pytest.mark.parametrize(("type", "draws"), [("llama", False), ("rwkv", True)])
def test_classes_of_the_library(type, draws):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[type](**SIZES))
    assert draws_into_weights(model) == draws


def test_mamba_2_keeps_a_linear_in_float_and_says_which():
    found = discover(CONFIG_MAPPING["mamba2"](**CONFIGS["mamba2"]))
    assert found.architecture.layers[0].groups == (("mixer.in_proj",),)
    assert any("mixer.out_proj of layer 0" in note and "stays float" in note for note in found.record.notes)
    assert all("mixer.out_proj" not in edge.dst for edge in found.architecture.layers[0].edges)
