"""Decoders that people quantize, one by one, the whole way: walk, edges, run folder, kill and resume."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from contracts import check_kind
from decoders import NAMED, config_of, saved
from lowbit.models.discovery import known
from lowbit.models.discovery.sites import InFloat64
from lowbit.models.forward import run_all
from runs import folder_bytes, quantize_tiny
from test_equivalence import random_maps
from tiny import block_of, params_of, skeleton_of, tiny_ids

pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(known, "_FOUND", {})
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name: a folder with a tiny model in it, and the model."""
    root, kept = tmp_path_factory.mktemp("models"), {}

    def make(name: str) -> tuple[Path, Any]:
        if name not in kept:
            kept[name] = root / name, saved(root / name, config_of(name, NAMED))
        return kept[name]

    return make


@pytest.mark.parametrize("name", NAMED)
def test_the_walk_is_the_model_bit_for_bit(name, made):
    _, model = made(name)
    skeleton, ids = skeleton_of(model), tiny_ids()
    x = skeleton.embed(ids)
    for index in range(len(skeleton.layers)):
        x = run_all(skeleton.block(index, params_of(model, skeleton, index)), x)
    with torch.no_grad():
        assert torch.equal(skeleton.logits(ids, x), model(ids, use_cache=False).logits)


@pytest.mark.parametrize("name", NAMED)
def test_every_edge_holds_in_float64(name, made):
    model = copy.deepcopy(made(name)[1]).double()
    edges = 0
    with InFloat64():
        for kind, layers in skeleton_of(model).architecture.kinds().items():
            block, x = block_of(model, start=layers[-1], dtype=torch.float64)
            check_kind(kind, block, x, random_maps, in_float32=False)
            edges += len(kind.edges)
    assert edges


# Linears of four inputs, which no group divides.
OVERRIDES = {"gemma3n_text": {"*prediction_coefs": "float", "*correction_coefs": "float"}}


class Killed(BaseException):
    """Passes every handler of errors, as a kill does."""


@pytest.mark.parametrize("name", NAMED)
def test_stock_transformers_computes_what_a_run_simulates_also_after_a_kill(name, made, tmp_path, monkeypatch):
    folder, model = made(name)
    more = {"recipe": "awq+gptq", "overrides": OVERRIDES.get(name)}
    run = quantize_tiny(folder, tmp_path / "run", "w4a16g16-sym", **more)
    assert run.manifest.transformers.loads
    ids = tiny_ids(2, 16)
    with torch.no_grad():
        ours = lowbit.load(run.out)(ids).logits
        stock = AutoModelForCausalLM.from_pretrained(run.out, dtype=torch.float32)(ids).logits
        exact = model(ids).logits
    assert torch.equal(ours, stock)
    assert 0 < (ours - exact).norm() < 0.7 * exact.norm()
    with monkeypatch.context() as patch:
        real = os.replace

        def replace(source: Any, target: Any) -> None:
            if Path(target).name == "block-00001.safetensors":
                raise Killed
            real(source, target)

        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            quantize_tiny(folder, tmp_path / "again", "w4a16g16-sym", **more)
    assert (tmp_path / "again" / "block-00000.safetensors").exists()
    quantize_tiny(folder, tmp_path / "again", "w4a16g16-sym", **more)
    assert folder_bytes(tmp_path / "again") == folder_bytes(run.out)
