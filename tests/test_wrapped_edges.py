"""Every proven edge of a vision-language model's text model, one by one, on the whole model with an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit.checkpoints.resolve import load_config
from lowbit.models.discovery import discover
from lowbit.models.discovery.fold import draw, fold
from lowbit.models.discovery.sites import InFloat64, owners_of
from wrapped import BLOCKS, image_inputs, save_wrapped

KINDS = {"gemma3": {"norm", "heads", "channels", "qk"}, "qwen3-vl": {"norm", "heads", "channels", "qk"}}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", [pytest.param("qwen3-vl", marks=pytest.mark.heavy), "gemma3"])
def test_every_proven_edge_leaves_the_logits_of_an_image_and_a_text(name, tmp_path):
    model = save_wrapped(tmp_path, name).double()
    inputs: dict[str, Any] = image_inputs(name)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    layers = discover(load_config(tmp_path, False)).architecture.layers
    params = dict(model.named_parameters())

    def logits(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), InFloat64():
            return torch.func.functional_call(model, changed, kwargs=inputs).logits

    right, generator = logits({}), torch.Generator().manual_seed(0)
    for index, layer in enumerate(model.get_submodule(BLOCKS)):
        prefix, owners = f"{BLOCKS}.{index}.", owners_of(layer)
        own = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
        assert {edge.kind for edge in layers[index].edges} == KINDS[name]
        for edge in layers[index].edges:
            map = draw(edge, owners, edge.limit, generator)
            both, alone = (fold(edge, owners, own, map, source_only=only) for only in (False, True))
            both, alone = ({prefix + key: value for key, value in one.items()} for one in (both, alone))
            ends = [key for key, value in both.items() if not torch.equal(value, params[key])]
            assert len(ends) >= 2
            assert difference(logits(both), right) < 1e-10, (index, edge)
            assert difference(logits(alone), right) > 1e-6, (index, edge)
