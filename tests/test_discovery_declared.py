"""Discovery finds, from a config alone, what is declared for the families: names, groups, edges and head layouts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.checkpoints.resolve import resolve
from lowbit.models.discovery import Discovery, discover
from lowbit.models.discovery.fold import draw, fold
from lowbit.models.discovery.sites import InFloat64, owners_of
from lowbit.models.discovery.small_model import redraw, run_eager_experts
from lowbit.models.families import architecture_of
from tiny import CONFIGS, MIXTURES, NAMES, tiny_model


@pytest.mark.parametrize("name", [*NAMES, *MIXTURES])
def test_a_declared_family_is_discovered(name):
    config = tiny_model(name).config
    found, wanted = discover(config), architecture_of(config)
    own = found.architecture
    assert own.layers == wanted.layers
    assert (own.blocks, own.head, own.embed) == (wanted.blocks, wanted.head, wanted.embed)
    assert own.origin == "discovered"
    assert found.record.checked == tuple(range(len(found.record.experts)))  # every kind is proven at its real shape
    assert Discovery.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_layer_of_many_experts_is_proven_with_few_of_them():
    config = tiny_model("mixtral", num_local_experts=48, num_hidden_layers=1).config
    found = discover(config, most_bytes=8 * 2**20)  # four experts take 3 MiB, 48 take 28
    (layer,) = found.architecture.layers
    assert found.record.checked == (0,)
    assert layer.experts.count == 48
    assert layer == architecture_of(config).layers[0]


@pytest.mark.slow
def test_a_real_model_is_discovered_at_its_own_sizes():
    config = AutoConfig.from_pretrained(resolve("demo").folder)
    found = discover(config)
    assert found.architecture.layers == architecture_of(config).layers
    assert found.record.checked == (0,)
    assert len(found.architecture.layers) == 30


PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
ODD = {**PARTIAL, "partial_rotary_factor": 0.45}  # of a head of 16: 7 dimensions, which take 4 angles
ZEROS = {**PARTIAL, "rope_type": "proportional"}


@pytest.mark.parametrize("rope", [PARTIAL, ODD, ZEROS], ids=["half", "odd", "proportional"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_part_of_a_head_that_rotates_is_the_class_s(name: str, rope: dict[str, Any]) -> None:
    """``partial_rotary_factor`` is a field of every config with a rotary embedding; few classes read it."""
    config = CONFIGS[name]()
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        pytest.skip("no rotary embedding")
    nested = any(isinstance(value, dict) for value in parameters.values())
    config.rope_parameters = {key: dict(rope) for key in parameters} if nested else dict(rope)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    config.architectures = [type(model).__name__]
    run_eager_experts(model)
    redraw(model, 0)
    found = architecture_of(config)
    inputs = torch.arange(3, 21)[None]
    with torch.no_grad(), InFloat64():
        wanted = model(inputs).logits
    for index, kind in enumerate(found.layers):
        layer = model.get_submodule(found.blocks)[index]
        params = dict(layer.named_parameters())
        for edge in (edge for edge in kind.edges if edge.kind == "qk"):
            owners = owners_of(layer)
            map = draw(edge, owners, edge.limit, torch.Generator().manual_seed(index))
            folded = fold(edge, owners, params, map)
            with torch.no_grad(), InFloat64():
                changed = {f"{found.blocks}.{index}.{key}": value for key, value in folded.items()}
                got = torch.func.functional_call(model, changed, (inputs,)).logits
            assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-9
