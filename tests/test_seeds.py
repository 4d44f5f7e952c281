"""The same request gives the same bytes, whatever the state of the global random generators."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import lowbit
from lowbit.methods.options import options_of
from lowbit.pipeline.recipe import load_recipe, recipe_names
from lowbit.pipeline.runner import Walk
from test_resume import folder_bytes
from tiny import save_tiny

pytestmark = pytest.mark.heavy  # makes whole runs by the dozen

# Few tries of what is searched or learned, so that a run is short.
FEW = {"epochs": 1, "tries": 2, "grid": 3, "sequences": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seeds") / "m"
    save_tiny(folder, "llama-odd", num_hidden_layers=2)
    return folder


def scramble(seed: int) -> None:
    """Put every global generator somewhere else."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def few(name: str) -> list[str]:
    """Settings that make a recipe short."""
    options = {(step, key) for step, method in load_recipe(name).steps for key in options_of(method)}
    return sorted(f"{step}.{key}={FEW[key]}" for step, key in options if key in FEW)


def runs(model: Path, folder: Path, recipe: str, data: str, seeds: tuple[int, int]) -> list[dict[str, bytes]]:
    """The files of two runs of one request, with global generators that differ before the run and in each window."""
    exact, found = Walk._window, []
    for seed in seeds:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Walk, "_window", lambda *given, seed=seed: (scramble(seed), exact(*given))[1])
            scramble(seed)
            sizes = {"data": data, "samples": 3, "length": 12, "seed": 5}
            lowbit.quantize(
                str(model), folder / f"{seed}", scheme="w4a4", recipe=recipe, settings=few(recipe), **sizes
            )
        found.append(folder_bytes(folder / f"{seed}"))
    return found


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("paper/")])
def test_two_runs_under_different_global_seeds_have_the_same_bytes(name, model, tmp_path):
    one, two = runs(model, tmp_path, name, str(model / "calib.txt"), (1, 2))
    assert set(one) == set(two)
    assert [file for file in one if one[file] != two[file]] == []


def test_text_that_is_sampled_from_the_model_depends_on_the_requests_seed_only(tmp_path):
    whole = save_tiny(tmp_path / "m", "llama", num_hidden_layers=1)
    with torch.no_grad():
        whole.lm_head.weight.mul_(0.02)  # near to even chances for every token
    whole.save_pretrained(tmp_path / "m")
    one, two = runs(tmp_path / "m", tmp_path, "gptq", "self", (1, 2))
    assert one == two
    given = {"scheme": "w4a4", "recipe": "gptq", "data": "self", "samples": 3, "length": 12, "seed": 6}
    other = folder_bytes(lowbit.quantize(str(tmp_path / "m"), tmp_path / "other", **given).out)
    assert other["block-00000.safetensors"] != one["block-00000.safetensors"]
