"""Discovery finds, from a config alone, what is declared for the families: names, groups, edges and head layouts."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from lowbit.checkpoints.resolve import resolve
from lowbit.models.discovery import Discovery, discover
from lowbit.models.families import architecture_of
from tiny import MIXTURES, NAMES, tiny_model


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
