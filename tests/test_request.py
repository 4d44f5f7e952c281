"""The first stage of quantize: defaults, what is refused without a model, and what the manifest keeps of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import LowbitError
from lowbit.pipeline.recipe import load_recipe
from lowbit.pipeline.request import DEFAULTS, Request, make_request
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme import Scheme
from lowbit.quant.scheme_files import scheme_from_dict, scheme_to_dict
from lowbit.quant.scheme_names import parse_scheme

NOTHING = dict.fromkeys(("data", "samples", "length", "seed", "effort"))
MACHINE = {"device": "cpu", "dtype": "float32", "compiled": False, "revision": None}
MACHINE |= {"allow_pickle": False, "trust_remote_code": False}


def request(**given: Any) -> Request:
    """A request for a model that is not there."""
    options: dict[str, Any] = {"scheme": None, "recipe": "gptq", "settings": (), "overrides": {}, "target": None}
    protocol = NOTHING | {key: given.pop(key) for key in list(given) if key in NOTHING}
    model = given.pop("model", "nowhere/at/all")
    return make_request(model, protocol=protocol, **MACHINE | options | given)


def test_what_is_left_out_is_the_default():
    told = request().to_dict()
    assert {key: told[key] for key in DEFAULTS} == {**DEFAULTS, "data": [DEFAULTS["data"]]}
    assert (told["model"], told["recipe"], told["settings"], told["target"]) == ("nowhere/at/all", "gptq", [], None)


def test_an_option_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: [rtn]\nrun: {scheme: w8a8, seed: 4, samples: 7}\n")
    told = request(recipe=str(tmp_path / "mine.yaml"), seed=5).to_dict()
    assert [told[key] for key in ("scheme", "seed", "samples", "length")] == ["w8a8", 5, 7, DEFAULTS["length"]]


@pytest.mark.parametrize(
    ("recipe", "effort", "settings", "wanted"),
    [
        ("gptq", None, (), 32),
        ("affinequant+gptq", None, (), 128),
        ("affinequant", "quick", (), 128),
        ("affinequant", "paper", (), 32),
        ("affinequant", "quick", ("affinequant.epochs=0",), 32),
        ("affinequant", "paper", ("affinequant.sequences=9",), 128),
    ],
)
def test_a_budget_that_is_spent_on_parts_of_the_text_draws_more_of_it(recipe, effort, settings, wanted):
    assert request(recipe=recipe, effort=effort, settings=settings).samples == wanted
    assert request(recipe=recipe, effort=effort, settings=settings, samples=7).samples == 7


def test_effort_and_settings_make_the_recipe_and_are_kept_beside_it():
    made = request(recipe="affinequant", effort="quick", settings=["affinequant.batch=4"])
    told = made.to_dict()
    assert (told["recipe"], told["effort"], told["settings"]) == ("affinequant", "quick", ["affinequant.batch=4"])
    assert made.given == load_recipe("affinequant")
    assert made.recipe != made.given


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("mine", IntFormat(4, 32, True)),
        replace(parse_scheme("w4a16g32-sym"), weight=IntFormat(3, 32, True)),
        replace(parse_scheme("w4a8-sym"), act=None),
    ],
)
def test_a_scheme_that_its_name_does_not_describe_is_refused(scheme):
    with pytest.raises(LowbitError, match=r"unknown scheme 'mine'|has other formats than its name says"):
        request(scheme=scheme)


@pytest.mark.parametrize("target", [None, "executorch", "llama.cpp"])
def test_a_scheme_file_with_a_target_is_recorded_with_its_overrides(target, tmp_path):
    (tmp_path / "s.yaml").write_text("scheme: w4a16g32-sym\n" + (f"target: {target}\n" if target else ""))
    made = request(scheme=str(tmp_path / "s.yaml"), overrides={"*.up_proj": "w8g32", "lm_head": "w4g32"}).scheme
    assert scheme_from_dict(scheme_to_dict(made)) == made


@pytest.mark.parametrize("recipe", ["awq+gptq", "hadamard+gptq"])
def test_an_importance_matrix_is_of_the_models_own_channels(recipe):
    with pytest.raises(LowbitError, match="changes the channels that an importance matrix describes"):
        request(recipe=recipe, settings=["gptq.search=true"], imatrix="some.gguf")


@pytest.mark.parametrize("effort", [None, "quick"])
def test_a_recipe_that_is_a_value_keeps_its_epochs_unless_asked(effort):
    made = request(recipe=load_recipe("affinequant"), effort=effort)
    assert (made.recipe == made.given) == (effort is None)
    assert made.effort == (effort or "paper")


def test_a_scheme_is_kept_with_its_overrides_however_it_was_given(tmp_path):
    (tmp_path / "s.yaml").write_text("scheme: w4a8\noverrides: {'*.up_proj': w8}\n")
    ways: list[dict[str, Any]] = [
        {"scheme": str(tmp_path / "s.yaml")},
        {"scheme": "w4a8", "overrides": {"*.up_proj": "w8"}},
        {"scheme": parse_scheme("w4a8"), "overrides": {"*.up_proj": "w8-sym"}},
    ]
    told = [request(**way).to_dict() for way in ways]
    assert told[0] == told[1] == told[2]
    assert (told[0]["scheme"], told[0]["overrides"]) == ("w4a8", [{"*.up_proj": "w8-sym"}])


def test_a_target_runtime_without_a_scheme_leaves_it_open():
    told = request(target="vllm", overrides={"lm_head": "w8"}).to_dict()
    assert (told["target"], told["scheme"], told["overrides"]) == ("vllm", None, [{"lm_head": "w8"}])


def test_nothing_of_this_machine_is_kept(tmp_path, monkeypatch):
    (tmp_path / "home/model").mkdir(parents=True)
    (tmp_path / "home/t.txt").write_text("text")
    (tmp_path / "mine.yaml").write_text("steps: [rtn]\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for model in ("~/model", str(tmp_path / "home/model")):
        told = request(model=model, data=f"{tmp_path}/home/t.txt", recipe=f"{tmp_path}/mine.yaml").to_dict()
        assert (told["model"], told["data"]) == ("model", ["t.txt"])
        assert (told["recipe"]["name"], told["recipe"]["steps"]) == ("mine", [{"rtn": {"search": False}}])
        assert Path(tmp_path).name not in json.dumps(told)
    for name in ("demo", "org/name"):
        assert request(model=name, data="wikitext2").to_dict()["model"] == name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"samples": 0}, "--samples 0 given; it must be 1 or more: give the number"),
        ({"length": 1}, "--length 1 given; it must be 2 or more: give the number"),
        ({"seed": -1}, "--seed -1 given; it must be 0 or more and below 2\\*\\*63: choose"),
        ({"recipe": "gtpq"}, "did you mean 'gptq'"),
        ({"effort": "quik"}, "did you mean 'quick'"),
        ({"settings": ["gptq.dampin=1"]}, "did you mean 'damping'"),
        ({"target": "vlm"}, "did you mean 'vllm'"),
        ({"scheme": "w9a16"}, "9 weight bits given; allowed: 2, 3"),
        ({"overrides": {"lm_head": "int8"}, "scheme": "w8a8"}, "give 'float', w"),
        ({"device": "tpu"}, "--device 'tpu' given; allowed: cpu"),
        ({"dtype": "int4"}, "--dtype int4 given; allowed: float32"),
        ({"compiled": True}, "--compile with --device cpu"),
    ],
)
def test_what_needs_no_model_is_refused_without_one(given, said):
    with pytest.raises(LowbitError, match=said):
        request(**given)
