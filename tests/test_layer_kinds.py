"""Layers of many shapes, also in one model, go through everything: the walk, maps, methods, folders."""

from __future__ import annotations

import pytest
import torch

import handmade
import lowbit
import tiny
from contracts import check_architecture
from lowbit.models import families
from lowbit.models.forward import relative_error
from lowbit.pipeline.recipe import load_recipe
from lowbit.runs.streamed_model import StreamedModel
from test_equivalence import random_maps
from tiny import save_tiny, tiny_ids, tiny_model

NAMES = [name for name in handmade.FAMILIES if name not in handmade.MIXTURES]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The architectures by hand are declared, and ``tiny_model`` knows them."""
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, *handmade.FAMILIES.values()))
    for name, config in handmade.CONFIGS.items():
        monkeypatch.setitem(tiny.CONFIGS, name, config)


@pytest.mark.parametrize("name", NAMES)
def test_the_walk_is_the_model_and_every_edge_holds(name):
    # Some libraries' layers compute in float32 whatever they are given: gains of 1 + w, or the rotary embedding.
    check_architecture(tiny_model(name), random_maps, in_float32=name in ("nemotron", "cohere"))


# With every seventh token another's worth of outliers, as ``tiny`` draws them, so that a method has something to do.
SCHEMES = {
    "rtn": "w4a8",
    "gptq": "w4a16g32-asym",
    "awq+gptq": "w3a16g32-asym",
    "affinequant": "w4a4",
    "smoothquant": "w8a8",
    "qllm-fold": "w4a4",
}


def run_of(folder, name, scheme, recipe, **more):
    """A run of a tiny model; the folder, and the model."""
    model = save_tiny(folder / "model", name)
    steps = [step for step, _ in load_recipe(recipe).steps]
    settings = [
        s for s in ("affinequant.epochs=2", "lowrank.epochs=2", "reassemble.tries=2") if s.split(".")[0] in steps
    ]
    text = str(folder / "model" / "calib.txt")
    given = {"scheme": scheme, "recipe": recipe, "data": text, "samples": 4, "length": 24, "settings": settings}
    lowbit.quantize(str(folder / "model"), folder / "run", **{**given, **more})
    return folder / "run", model


@pytest.mark.parametrize("recipe", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_methods_run_and_the_folder_computes_what_was_simulated(name, recipe, tmp_path):
    run, model = run_of(tmp_path, name, SCHEMES[recipe], recipe)
    ids = tiny_ids(2, 16)
    with torch.no_grad():
        logits, wanted = lowbit.load(run)(ids).logits, model(ids).logits
    streamed = StreamedModel(run)
    assert torch.equal(next(iter(streamed.logits(ids))), logits)
    assert 0 < relative_error(logits, wanted) < 0.5
