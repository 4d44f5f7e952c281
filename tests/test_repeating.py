"""The command that a report prints gives the very same bytes, and holds nothing of the machine it was made on."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml

import lowbit
from lowbit.checkpoints.json_file import read_json
from lowbit.cli.main import call
from lowbit.pipeline.recipe import load_recipe
from lowbit.reports.command import command
from tiny import save_tiny

MINE = (
    "steps: [{smoothquant: {alpha: 0.3}}, {affinequant: {epochs: 3}}, {gptq: {damping: 0.05}}]\nwindow: 2\n"
    "run: {seed: 4, effort: quick}\n"
)

pytestmark = pytest.mark.heavy  # makes whole runs by the dozen
CASES = {
    "plain": ["--recipe", "rtn"],
    "settings": ["--recipe", "affinequant", "--set", "affinequant.epochs=1", "--set", "affinequant.heads=off"],
    "effort": ["--recipe", "lowrank", "--effort", "quick", "--set", "lowrank.epochs=1", "--seed", "3"],
    "overrides": ["--recipe", "gptq", "--override", "*.down_proj=w8", "--override", "*.0.*=w4g16-asym"],
    "file": ["--recipe", "{m}/mine.yaml", "--scheme", "{m}/formats.yaml", "--set", "gptq.damping=0.02"],
    "target": ["--recipe", "gptq", "--target", "llama.cpp", "--override", "lm_head=w8g32"],
}


@pytest.fixture
def m(tmp_path):
    """A tiny model with a recipe and a scheme beside it."""
    folder = tmp_path / "m"
    save_tiny(folder, "llama")
    (folder / "mine.yaml").write_text(MINE)
    (folder / "formats.yaml").write_text("scheme: w4a8\noverrides: {'*.up_proj': w8}\n")
    return folder


def repeated(out, m, monkeypatch) -> bytes:
    """The manifest of the run that the printed command makes, where only names of files are the same."""
    text, recipe = command(read_json(out / "lowbit.json")["request"])
    place = m.parent / "elsewhere"
    place.mkdir()
    (place / "m").symlink_to(m)
    (place / "calib.txt").symlink_to(m / "calib.txt")
    if recipe is not None:
        (place / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(place)
    program, *words = shlex.split(text)
    assert program == "lowbit"
    assert call(words) == 0
    return (place / "DIR/lowbit.json").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_the_command_gives_the_same_bytes(case, m, tmp_path, monkeypatch):
    given = [word.replace("{m}", str(m)) for word in CASES[case]]
    common = ["--data", f"{m}/calib.txt", "--samples", "3", "--length", "16"]
    common += [] if case == "target" else ["--scheme", "w4a16g16-sym"]
    assert call(["quantize", str(m), "--out", str(tmp_path / "one"), *common, *given]) == 0
    told = (tmp_path / "one/lowbit.json").read_bytes()
    assert str(tmp_path).encode() not in told
    _, recipe = command(json.loads(told)["request"])
    assert (recipe is None) == (case != "file")
    assert repeated(tmp_path / "one", m, monkeypatch) == told


def test_a_recipe_that_is_a_value_is_printed_as_a_file(m, tmp_path, monkeypatch):
    value = lowbit.load_recipe(str(m / "mine.yaml"))
    text = {"data": str(m / "calib.txt"), "samples": 3, "length": 16, "scheme": "w4a16g16-sym", "seed": 4}
    made = lowbit.quantize(str(m), tmp_path / "one", recipe=value, settings=["affinequant.epochs=1"], **text)
    repeat, recipe = command(made.manifest.request)
    assert "--recipe mine.yaml --effort paper --set=affinequant.epochs=1" in repeat
    steps = yaml.safe_load(recipe)["steps"]
    assert [next(iter(step)) for step in steps] == ["smoothquant", "affinequant", "gptq"]
    assert steps[1]["affinequant"]["epochs"] == 3
    assert repeated(tmp_path / "one", m, monkeypatch) == (tmp_path / "one/lowbit.json").read_bytes()


def test_a_recipe_of_the_package_that_is_a_value_goes_by_its_name(m, tmp_path):
    text = {"data": str(m / "calib.txt"), "samples": 3, "length": 16, "scheme": "w4a16g16-sym"}
    made = lowbit.quantize(str(m), tmp_path / "one", recipe=load_recipe("rtn"), **text)
    assert command(made.manifest.request)[0].endswith(
        "--scheme w4a16g16-sym --recipe rtn --effort paper --data calib.txt --samples 3 --length 16 --seed 0"
    )


def test_every_option_that_was_given_is_printed():
    request = {
        "model": "org/name",
        "recipe": "gptq",
        "effort": "quick",
        "settings": ["gptq.target=output"],
        "scheme": "w4a16",
        "overrides": [{"*.down_proj": "w8-sym"}, {"lm_head": "float"}],
        "target": "vllm",
        "data": ["wikitext2"],
        "samples": 4,
        "length": 16,
        "seed": 7,
        "device": "cuda",
        "dtype": "bfloat16",
        "expert_tokens": 8,
        "all_experts": True,
        "merge_only": True,
        "compiled": True,
        "revision": "v1",
        "allow_pickle": True,
        "trust_remote_code": True,
    }
    assert command(request) == (
        "lowbit quantize org/name --out DIR --scheme w4a16 --recipe gptq --effort quick --set=gptq.target=output "
        "--target vllm '--override=*.down_proj=w8-sym' --override=lm_head=float --data wikitext2 --samples 4 "
        "--length 16 --seed 7 --device cuda --dtype bfloat16 --revision v1 --expert-tokens 8 --merge-only "
        "--all-experts --compile --allow-pickle "
        "--trust-remote-code",
        None,
    )
