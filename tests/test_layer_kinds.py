"""Layers of many shapes, also in one model, go through everything: the walk, maps, methods, folders."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import handmade
import lowbit
import tiny
from contracts import check_architecture
from lowbit.errors import LowbitError
from lowbit.methods.reassemble import fold
from lowbit.models import families
from lowbit.models.description import to_dict
from lowbit.models.families import architecture_of
from lowbit.models.forward import relative_error, run_all
from lowbit.pipeline.inspect import inspect_model
from lowbit.pipeline.recipe import recipe_from_dict
from lowbit.runs.manifest import manifest_of
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


def test_copies_before_a_squared_activation_share_its_square():
    """Three copies of a channel of relu^2 have rows that are a third of the square each: over the root of 3."""
    block, x = tiny.block_of(tiny_model("nemotron"), 1, dtype=torch.float64)
    edge = next(edge for edge in block.edges() if edge.kind == "channels")
    assert edge.power == 2
    down = edge.readers[0].parameter
    weight = block.params[down].clone()
    weight[:, :2] = 0  # nothing is lost where copies take these places
    block = replace(block, params={**block.params, down: weight})
    idx = torch.arange(weight.shape[1])
    idx[:2] = 5
    moved = fold(block, edge, idx, torch.where(idx == 5, 3.0, 1.0).double(), weight)
    first, second = (run_all(one, x) for one in (block, moved))
    assert torch.allclose(second, first, rtol=1e-6, atol=1e-6 * float(first.abs().max()))
    assert not torch.equal(moved.params[down], block.params[down])


@pytest.mark.parametrize("name", NAMES)
def test_the_walk_is_the_model_and_every_edge_holds(name):
    # Some libraries' layers compute in float32 whatever they are given: gains of 1 + w, or the rotary embedding.
    check_architecture(tiny_model(name), random_maps, in_float32=name in ("nemotron", "cohere"))


def run_of(folder, name, scheme, recipe, **more):
    """A run of a tiny model; the folder, and the model."""
    model = save_tiny(folder / "model", name)
    text = str(folder / "model" / "calib.txt")
    given = {"scheme": scheme, "recipe": recipe, "data": text, "samples": 2, "length": 24}
    lowbit.quantize(str(folder / "model"), folder / "run", **{**given, **more})
    return folder / "run", model


def check_run(run, model):
    """The folder computes in its blocks and as a whole model the same, which is close to the float model."""
    ids = tiny_ids(2, 16)
    with torch.no_grad():
        logits, wanted = lowbit.load(run)(ids).logits, model(ids).logits
    ((_, simulated),) = StreamedModel(run).logits(ids)
    assert torch.equal(simulated, logits)
    assert 0 < relative_error(logits, wanted) < 0.5
    return logits


EPOCHS = ["affinequant.epochs=1"]
RECIPES = [("awq+gptq", "w4a16g32-sym", []), ("affinequant", "w4a4", EPOCHS)]
MORE = [
    ("smoothquant", "w8a8", []),
    ("qllm", "w4a4", ["lowrank.epochs=1", "reassemble.tries=2"]),
    ({"steps": ["signs", "rtn", {"tune": {"epochs": 1}}]}, "w4a8", []),
]
CASES = [*RECIPES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


@pytest.mark.parametrize(("recipe", "scheme", "settings"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_methods_run_and_the_folder_computes_what_was_simulated(name, recipe, scheme, settings, tmp_path):
    recipe = recipe if isinstance(recipe, str) else recipe_from_dict(recipe, "mine")
    run, model = run_of(tmp_path, name, scheme, recipe, settings=settings)
    logits = check_run(run, model)
    said = manifest_of(run).transformers
    if scheme != "w4a16g32-sym":
        return
    # Stock transformers computes the same, except for matrices that it does not know how to unpack.
    assert said.loads == (name != "gpt2")
    if said.loads:
        stock = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(stock(tiny_ids(2, 16)).logits, logits)
    else:
        assert "stored as (in, out)" in said.why_not
        for target in ("vllm", "gptq", "gguf"):
            with pytest.raises(LowbitError, match=r"stored as \(in, out\) by its library"):
                lowbit.export(run, target)


def test_a_window_holds_layers_of_different_kinds(tmp_path):
    recipe = recipe_from_dict({"steps": [{"affinequant": {"epochs": 1}}, "gptq"], "window": 2}, "mine")
    check_run(*run_of(tmp_path, "lfm2", "w4a4", recipe))


def test_layers_without_an_attention_function_have_no_queries_to_quantize(tmp_path):
    run, model = run_of(tmp_path, "lfm2", "w4a8kv4", "rtn")
    check_run(run, model)
    rows = manifest_of(run).blocks
    assert [any("no attention function" in note for note in row.notes) for row in rows] == [True, False, True]
    with pytest.raises(LowbitError, match="no layer of this model has an attention function"):
        run_of(tmp_path / "bloom", "bloom", "w4a8kv4", "rtn")


def test_inspect_and_the_manifest_tell_the_kinds_of_layers(tmp_path):
    run, model = run_of(tmp_path, "lfm2", "w4a8", "rtn")
    conv, attention = inspect_model(str(run), "w4a8", "rtn", samples=2, length=16)["kinds"]
    assert (conv["layers"], attention["layers"]) == ("0, 2", "1")
    assert conv["edges"][:2] == [
        "norm: operator_norm -> conv.in_proj (a diagonal)",
        "channels: B of conv.in_proj -> conv.out_proj (a diagonal)",
    ]
    assert (
        "heads: self_attn.v_proj -> self_attn.out_proj (any matrix, 4 query and 2 key/value heads of width 16)"
        in (attention["edges"])
    )
    stored = manifest_of(run).architecture
    assert stored == to_dict(architecture_of(model.config)) == json.loads(json.dumps(stored))
    assert [kind["layers"] for kind in stored["kinds"]] == [[0, 2], [1]]
    assert stored["kinds"][0]["edges"][1]["src"] == {"module": "conv.in_proj", "name": "B", "rows": [[0, 64]]}
