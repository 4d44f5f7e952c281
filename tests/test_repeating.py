"""The command that a report prints gives the very same bytes."""

from __future__ import annotations

import shlex

import pytest

from lowbit.checkpoints.safetensors_folder import read_json
from lowbit.cli.main import call
from lowbit.reports.command import command
from tiny import save_tiny

MINE = "steps: [{smoothquant: {alpha: 0.3}}, {gptq: {damping: 0.05}}]\nwindow: 2\n"
CASES = {
    "plain": ["--recipe", "rtn"],
    "settings": ["--recipe", "affinequant", "--set", "affinequant.epochs=1", "--set", "affinequant.heads=off"],
    "effort": ["--recipe", "lowrank", "--effort", "quick", "--set", "lowrank.epochs=1", "--seed", "3"],
    "overrides": ["--recipe", "gptq", "--override", "*.down_proj=w8", "--override", "*.0.*=w4g16-asym"],
    "file": ["--recipe", "{m}/mine.yaml", "--scheme", "{m}/formats.yaml"],
}


@pytest.mark.parametrize("case", CASES)
def test_the_command_gives_the_same_bytes(case, tmp_path, monkeypatch):
    m = tmp_path / "m"
    save_tiny(m, "llama")
    (m / "mine.yaml").write_text(MINE)
    (m / "formats.yaml").write_text("scheme: w4a8\noverrides: {'*.up_proj': w8}\n")
    given = [word.replace("{m}", str(m)) for word in CASES[case]]
    common = ["--scheme", "w4a16g16-sym", "--data", f"{m}/calib.txt", "--samples", "3", "--length", "16"]
    assert call(["quantize", str(m), "--out", str(tmp_path / "one"), *common, *given]) == 0
    text, recipe = command(read_json(tmp_path / "one/lowbit.json")["identity"])
    # Where the model and its text lie is for the reader to know.
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "m").symlink_to(m)
    (place / "calib.txt").symlink_to(m / "calib.txt")
    if recipe is not None:
        (place / "mine.yaml").write_text(recipe)
    assert (recipe is None) == (case != "file")
    monkeypatch.chdir(place)
    program, *words = shlex.split(text)
    assert program == "lowbit"
    assert call(words) == 0
    assert (place / "DIR/lowbit.json").read_bytes() == (tmp_path / "one/lowbit.json").read_bytes()


def test_a_recipe_of_the_package_needs_no_file_and_few_settings():
    identity = read_json_like("affinequant")
    text, recipe = command(identity)
    assert recipe is None
    assert "--recipe affinequant --effort quick --data" in text
    fused, _ = command({**identity, "device": "cuda", "compiled": True})
    assert fused == f"{text} --device cuda --compile"


def read_json_like(name: str) -> dict:
    """The identity of a quick run of a recipe."""
    from lowbit.pipeline.recipe import load_recipe, recipe_to_dict, with_effort

    return {
        "model": "demo",
        "recipe": recipe_to_dict(with_effort(load_recipe(name), "quick")),
        "recipe_name": name,
        "scheme": {"scheme": "w4a16", "overrides": []},
        "data": {"corpus": "builtin:wiki+c4 (first 80 %)", "samples": 4, "length": 16},
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
    }
