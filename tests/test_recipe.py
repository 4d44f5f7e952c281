"""Recipes: what comes with the package, YAML, settings, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import lowbit
from lowbit.errors import LowbitError
from lowbit.methods import AFTER, METHODS
from lowbit.methods.awq import AWQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.options import options_of
from lowbit.methods.rtn import RTN
from lowbit.methods.smoothquant import SmoothQuant
from lowbit.pipeline.recipe import (
    Recipe,
    load_recipe,
    recipe_from_dict,
    recipe_names,
    recipe_to_dict,
    with_effort,
    with_settings,
)
from lowbit.pipeline.request import DEFAULTS
from lowbit.quant.scheme_names import parse_scheme
from tiny import save_tiny


def test_the_recipes_that_people_will_ask_for_are_there():
    assert {"rtn", "gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_loads_ends_in_rounding_and_survives_the_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    rounds = [method.rounds for _, method in recipe.block_steps]
    assert rounds == [False] * (len(rounds) - 1) + [True]
    assert all(type(method) is (METHODS | AFTER)[step] for step, method in recipe.steps)
    plain = recipe_to_dict(recipe)
    recipe = replace(recipe, run={})  # settled before a manifest is written
    assert recipe_from_dict(plain, name) == recipe
    assert recipe_from_dict(json.loads(json.dumps(plain)), name) == recipe
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(plain)), name) == recipe


def test_what_is_written_down_names_every_option():
    assert recipe_to_dict(load_recipe("gptq")) == {
        "steps": [
            {
                "gptq": {
                    "damping": 0.01,
                    "shrinkage": 1.0,
                    "act_order": True,
                    "block_size": 128,
                    "tokens": "normalized",
                    "target": "weights",
                    "search": False,
                    "ridge": 0.1,
                    "head": False,
                }
            }
        ],
        "window": 1,
    }


def test_a_recipe_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "steps:\n  - smoothquant: {alpha: 1}\n  - awq:\n  - gptq: {damping: 0.05, act_order: false}\nwindow: 2\n"
    )
    steps = (("smoothquant", SmoothQuant(1.0)), ("awq", AWQ()), ("gptq", GPTQ(0.05, act_order=False)))
    assert load_recipe(str(path)) == Recipe("mine", steps, 2)
    assert type(dict(load_recipe(str(path)).steps)["smoothquant"].alpha) is float


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gtpq", "unknown recipe 'gtpq': did you mean 'gptq'.* Known: affinequant, "),
        ("awq-gptq", r"did you mean 'awq\+gptq'"),
        ("zzz", "unknown recipe 'zzz': Known: affinequant.*smoothquant"),
        ("paper/affinequant-opt-125m-w3a1", "did you mean 'paper/affinequant-opt-125m-w3a16'"),
        ("../rtn", "unknown recipe"),
        ("nowhere.yaml", "cannot read the recipe nowhere.yaml"),
    ],
)
def test_an_unknown_recipe(given, message):
    with pytest.raises(LowbitError, match=message):
        load_recipe(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [rtn\n", "is not valid YAML"),
        ("- rtn\n", "expected a key 'steps'"),
        ("", "expected a key 'steps'"),
        ("steps: rtn\n", "expected a key 'steps' with a list"),
        ("steps: []\n", "has no steps"),
        ("steps: [rtn]\nwindows: 2\n", "unknown key in recipe 'wrong' 'windows': did you mean 'window'"),
        ("steps: [rtn]\nwindow: 0\n", "window 0 given; it must be 1 or more"),
        ("steps: [rtn]\nwindow: 1.5\n", "window must be a whole number, got 1.5"),
        ("steps: [rtn]\nwindow: true\n", "window must be a whole number, got True"),
        ("steps: [smothquant, rtn]\n", "unknown step 'smothquant': did you mean 'smoothquant'"),
        ("steps: [1, rtn]\n", "a step is a method's name"),
        ("steps: [{awq: {}, rtn: {}}]\n", "one name with its options"),
        ("steps: [{gptq: {dampening: 1.0}}]\n", "unknown field of gptq 'dampening': did you mean 'damping'"),
        ("steps: [{gptq: {act_order: 1}}]\n", "gptq.act_order: 1 given; true or false is allowed"),
        ("steps: [{gptq: {block_size: 1.5}}]\n", "gptq.block_size: 1.5 given; a whole number is allowed"),
        ("steps: [{gptq: {block_size: true}}]\n", "gptq.block_size: True given; a whole number is allowed"),
        ("steps: [{gptq: {damping: much}}]\n", "gptq.damping: 'much' given; a number is allowed"),
        ("steps: [{gptq: {damping: }}]\n", "gptq.damping: None given; a number is allowed"),
        ("steps: [{gptq: {damping: 0}}]\n", "gptq.damping 0 given; it must be above 0"),
        ("steps: [{gptq: 3}]\n", "options of gptq must be 'field: value' pairs; got 3"),
        ("steps: [{gptq: false}]\n", "options of gptq must be 'field: value' pairs; got False"),
        ("steps: [{smoothquant: {alpha: 2.0}}, rtn]\n", "smoothquant.alpha 2 given; it must be from 0 to 1"),
        ("steps: [rtn, awq]\n", "exactly one step quantizes, and it comes last; one of .*gptq"),
        ("steps: [awq]\n", "exactly one step quantizes"),
        ("steps: [rtn, gptq]\n", "exactly one step quantizes"),
    ],
)
def test_a_wrong_recipe_file_is_told_what_is_wrong_in_one_line(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(LowbitError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_recipes_in_python_are_checked_too():
    with pytest.raises(LowbitError, match="has no steps"):
        Recipe("none", ())
    with pytest.raises(LowbitError, match="it comes last"):
        Recipe("backwards", (("rtn", RTN()), ("awq", AWQ())))
    with pytest.raises(LowbitError, match="window -1 given"):
        Recipe("negative", (("rtn", RTN()),), window=-1)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("gptq.damping=0.05", GPTQ(damping=0.05)),
        ("gptq.damping=1", GPTQ(damping=1.0)),
        ("gptq.damping=1e-3", GPTQ(damping=1e-3)),  # YAML 1.1 alone would read text here
        ("gptq.act_order=false", GPTQ(act_order=False)),
        ("gptq.block_size=64", GPTQ(block_size=64)),
    ],
)
def test_a_setting_has_the_type_of_its_field(setting, wanted):
    step = with_settings(load_recipe("gptq"), [setting]).steps[0][1]
    assert step == wanted
    assert type(step.damping) is float


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gptq.damping=high", "gptq.damping: 'high' given; a number is allowed"),
        ("gptq.damping=", "gptq.damping: None given; a number is allowed"),
        ("gptq.damping=nan", "gptq.damping: 'nan' given; a number is allowed"),
        ("gptq.damping=.nan", "gptq.damping: nan given; a number is allowed"),
        ("gptq.damping=.inf", "gptq.damping: inf given; a number is allowed"),
        ("gptq.damping=1e999", "gptq.damping: inf given; a number is allowed"),
        ("gptq.act_order=0", "gptq.act_order: 0 given; true or false is allowed"),
        ("gptq.block_size=1e2", "gptq.block_size: '1e2' given; a whole number is allowed"),
        ("gptq.block_size=0", "gptq.block_size 0 given; it must be 1 or more"),
        ("gptq.dampin=1", "unknown field of gptq 'dampin': did you mean 'damping'"),
        ("awq.grid=3", "unknown step in recipe 'gptq' 'awq': Known: gptq"),
        ("gptk.damping=1", "unknown step in recipe 'gptq' 'gptk': did you mean 'gptq'"),
        ("gptq", "give step.field=value"),
        ("gptq=1", "give step.field=value"),
        ("gptq.=1", "give step.field=value"),
        ("gptq.damping", "give step.field=value"),
        ("gptq.damping=[1", "is not valid YAML"),
    ],
)
def test_a_wrong_setting(setting, message):
    with pytest.raises(LowbitError, match=message):
        with_settings(load_recipe("gptq"), [setting])


def test_settings_leave_the_recipe_and_other_steps_alone_and_the_last_one_counts():
    recipe = load_recipe("smoothquant+gptq")
    changed = with_settings(recipe, ["smoothquant.alpha=0.8", "gptq.damping=0.1", "smoothquant.alpha=0.9"])
    assert changed.steps == (("smoothquant", SmoothQuant(0.9)), ("gptq", GPTQ(damping=0.1)))
    assert recipe == load_recipe("smoothquant+gptq")
    twice = Recipe("twice", (("smoothquant", SmoothQuant()), ("smoothquant", SmoothQuant(0.1)), ("rtn", RTN())))
    assert [m for _, m in with_settings(twice, ["smoothquant.alpha=1"]).steps] == [SmoothQuant(1.0)] * 2 + [RTN()]


def test_every_file_in_the_recipes_folder_is_found(monkeypatch):
    import lowbit

    folder = Path(lowbit.__file__).parent / "recipes"
    found = sorted(str(p.relative_to(folder)).removesuffix(".yaml") for p in folder.rglob("*.yaml"))
    assert found == sorted(recipe_names())
    assert replace(load_recipe("rtn"), name="x").steps == (("rtn", RTN()),)


def options(recipe, name):
    """The options of a recipe's step by their flat names."""
    return SimpleNamespace(**options_of(dict(recipe.steps)[name]))


def epochs(recipe):
    return [step.schedule.epochs for _, step in recipe.steps if step.schedule is not None]


@pytest.mark.parametrize(("effort", "wanted"), [("quick", 6), ("normal", 10), ("paper", 20)])
def test_effort_scales_the_epochs_of_learned_steps(effort, wanted):
    recipe = with_effort(load_recipe("affinequant"), effort)
    assert epochs(recipe) == [wanted]
    assert [step.schedule.sequences for _, step in recipe.steps[:1]] == [0 if effort == "paper" else 28]
    mine = with_effort(with_settings(load_recipe("affinequant"), ["affinequant.sequences=5"]), effort)
    assert mine.steps[0][1].schedule.sequences == 5
    assert recipe.steps[1] == load_recipe("affinequant").steps[1]
    assert with_effort(load_recipe("gptq"), effort) == load_recipe("gptq")
    for few in (0, 1):
        assert epochs(with_effort(with_settings(recipe, [f"affinequant.epochs={few}"]), effort)) == [few]


def test_an_unknown_effort_names_the_nearest():
    with pytest.raises(LowbitError, match="quick"):
        with_effort(load_recipe("rtn"), "quik")


def test_a_recipe_names_its_protocol_and_a_person_has_the_last_word(tmp_path):
    folder = tmp_path / "m"
    save_tiny(folder, "llama")
    calib = str(folder / "calib.txt")
    path = tmp_path / "mine.yaml"
    path.write_text(
        "steps: [{affinequant: {epochs: 4}}, rtn]\n"
        f"run: {{scheme: w4a16g16-sym, data: {calib}, samples: 2, length: 16, seed: 3, effort: quick}}\n"
    )
    made = lowbit.quantize(str(folder), tmp_path / "a", recipe=str(path)).manifest.identity
    assert made.scheme["scheme"] == "w4a16g16-sym"
    assert (made.data.samples, made.data.length, made.seed) == (2, 16, 3)
    assert made.recipe["steps"][0]["affinequant"]["epochs"] == 2
    assert "run" not in made.recipe
    made = lowbit.quantize(
        str(folder),
        tmp_path / "b",
        scheme="w8a16",
        recipe=str(path),
        samples=3,
        effort="paper",
        settings=["affinequant.lr_maps=0.01"],
    ).manifest.identity
    assert made.scheme["scheme"] == "w8a16"
    assert (made.data.samples, made.data.length) == (3, 16)
    assert made.recipe["steps"][0]["affinequant"]["epochs"] == 4
    assert made.recipe["steps"][0]["affinequant"]["lr_maps"] == 0.01


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"sheme": "w4a16"}, "scheme"),
        ({"samples": "many"}, "run.samples: 'many' given; a whole number is allowed"),
        ({"seed": 1.5}, "run.seed"),
        (["w4a16"], "field: value"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(run, message):
    with pytest.raises(LowbitError, match=message):
        recipe_from_dict({"steps": ["rtn"], "run": run}, "mine")


def published():
    groups = ["w2a16g128", "w2a16g64", "w3a16", "w3a16g128", "w4a16", "w4a16g128", "w4a4", "w6a6"]
    for size in ("125m", "1.3b", "2.7b", "6.7b", "13b", "30b"):
        yield from (f"opt-{size}-{scheme}" for scheme in groups)
    for model in ("1-7b", "1-13b", "1-30b", "2-7b", "2-13b"):
        yield from (f"llama-{model}-{scheme}" for scheme in ["w2a16", *groups])


def test_every_published_configuration_is_a_recipe():
    names = {f"paper/affinequant-{name}" for name in published()}
    assert {name for name in recipe_names() if "affinequant-" in name} == names


@pytest.mark.parametrize("name", list(published()))
def test_recipes_of_published_rows(name):
    recipe = load_recipe(f"paper/affinequant-{name}")
    step, run = options(recipe, "affinequant"), recipe.run
    scheme = parse_scheme(run["scheme"])
    model, _, wanted = name.rpartition("-")
    assert run["scheme"] == (f"{wanted}kv4-asym" if wanted == "w4a4" else f"{wanted}-asym")
    assert (run["data"], run["samples"], run["length"], run["seed"]) == ("wikitext2", 128, 2048, 2)
    assert run["effort"] == "paper"
    assert step.epochs == (40 if scheme.weight.bits == 2 else 20)
    assert (step.mask, step.parametrisation, step.loss, step.batch) == ("gradual", "masked", "mse", 1)
    assert step.shift == model.startswith("opt")
    weight_only = scheme.act is None
    dense = weight_only and (
        model.startswith(("opt", "llama-1")) or (model == "llama-2-7b" and (wanted == "w3a16" or "w2" in wanted))
    )
    assert step.qkv == step.mlp == ("matrix" if dense else "diagonal")
    # The scripts ask for matrices between q and k (--use_matrix) where activations are rounded, and nowhere else.
    assert (step.heads, step.qk, step.channels) == ("matrix", "diagonal" if weight_only else "matrix", "off")
    assert (step.dominance, step.held_out, step.grad_clip) == ("report", 0.0, 0.0)
    assert step.init_peaks == "absolute"
    aug = model.startswith("llama") and scheme.weight.bits == 2
    assert step.aug_loss == (1.0 if aug or (model.startswith("llama-1") and not weight_only) else 0.0)
    slow = model.startswith("llama-2") and not weight_only
    assert (step.lr_maps, step.lr_clips, step.decay) == (1e-3 if slow else 5e-3, 1e-2, "none")
    assert step.init_power == (
        0.75 if not weight_only and model.startswith(("opt", "llama-2", "llama-1-30b")) else 0.5
    )


@pytest.mark.parametrize("name", list(published()))
def test_recipes_of_published_rows_do_not_rest_on_defaults_that_are_tuned_for_short_fits(name):
    folder = Path(lowbit.__file__).parent / "recipes/paper"
    written = yaml.safe_load((folder / f"affinequant-{name}.yaml").read_text())["steps"][0]["affinequant"]
    tuned = {"lr_maps", "lr_clips", "decay", "loss", "epochs", "batch", "init_power", "held_out", "grad_clip"}
    tuned.add("init_peaks")
    shape = {"parametrisation", "mask", "stability", "dominance", "qk", "channels"}
    assert not (tuned | shape) - set(written)


def test_stability_factors_of_published_rows():
    for name, wanted in {
        "opt-125m-w3a16": 1.0,
        "opt-1.3b-w4a16g128": 0.1,
        "opt-2.7b-w3a16": 0.1,
        "opt-2.7b-w2a16g128": 0.1,
        "opt-6.7b-w2a16g128": 1.0,
        "opt-6.7b-w3a16": 0.1,
        "opt-13b-w4a16": 0.01,
        "opt-30b-w2a16g64": 0.01,
        "llama-1-7b-w2a16": 0.01,
        "llama-1-7b-w4a4": 0.1,
        "llama-2-7b-w3a16": 0.01,
        "llama-2-7b-w3a16g128": 1.0,
        "llama-2-13b-w2a16": 1.0,
    }.items():
        assert options(load_recipe(f"paper/affinequant-{name}"), "affinequant").stability == wanted, name


def test_the_page_on_recipes_says_what_is_there():
    page = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    named = set(re.findall(r"--recipe (paper/\S+)", page))
    assert named
    assert named <= set(recipe_names())
    models, schemes = (
        re.findall(pattern, page) for pattern in (r"`((?:opt|llama)-[\w.-]+)`", r"`(w\da\d+(?:g\d+)?)`")
    )
    assert {name.rpartition("-")[0] for name in published()} == set(models)
    assert {name.rpartition("-")[2] for name in published()} <= set(schemes)
    defaults = dict(re.findall(r"^\| `(\w+)` \| `?([\w-]+)`? \|$", page, re.M))
    assert defaults == {key: str(value) for key, value in DEFAULTS.items()}
    example = page.partition("```yaml\n")[2].partition("```")[0]
    assert recipe_from_dict(yaml.safe_load(example), "mine").run["scheme"] == "w3a16-asym"


QLLM_MODELS = [f"llama-{model}" for model in ("1-7b", "1-13b", "1-30b", "1-65b", "2-7b", "2-13b", "2-70b")]
QLLM_SCHEMES = {"w4a4": "w4a4kv4-asym", "w4a8": "w4a8kv8-asym", "w6a6": "w6a6-asym"}
QLLM_SLOW = {"llama-2-7b-w4a4", "llama-2-7b-w4a8", "llama-2-13b-w6a6", *(f"llama-2-70b-{s}" for s in QLLM_SCHEMES)}


def test_every_published_row_of_qllm_is_a_recipe():
    names = {f"paper/qllm-{model}-{scheme}" for model in QLLM_MODELS for scheme in QLLM_SCHEMES}
    assert {name for name in recipe_names() if "/qllm-" in name} == names


@pytest.mark.parametrize("scheme", QLLM_SCHEMES)
@pytest.mark.parametrize("model", QLLM_MODELS)
def test_recipes_of_qllms_rows(model, scheme):
    recipe = load_recipe(f"paper/qllm-{model}-{scheme}")
    assert [name for name, _ in recipe.steps] == ["reassemble", "lowrank", "rtn"]
    split, correction = options(recipe, "reassemble"), options(recipe, "lowrank")
    assert (recipe.window, correction.rank, correction.epochs, correction.batch) == (4, 4, 10, 1)
    assert (split.sites, split.assembly, split.peaks, split.tokens) == ("all", "bipartite", "absolute", "unweighted")
    assert (split.most, split.offsets) == (0.2, "none")
    assert correction.lr == (1e-4 if f"{model}-{scheme}" in QLLM_SLOW else 5e-4)
    assert (correction.loss, correction.clips, correction.norms, correction.held_out) == ("mse", False, False, 0.0)
    assert recipe.run["scheme"] == QLLM_SCHEMES[scheme]
    parse_scheme(recipe.run["scheme"])
    assert (recipe.run["data"], recipe.run["samples"], recipe.run["length"], recipe.run["seed"]) == (
        "wikitext2",
        128,
        2048,
        2,
    )
    folder = Path(lowbit.__file__).parent / "recipes/paper"
    written = yaml.safe_load((folder / f"qllm-{model}-{scheme}.yaml").read_text())["steps"]
    assert {"most", "grid", "tries", "sequences", "peaks", "tokens", "assembly"} <= set(written[0]["reassemble"])
    tuned = {"lr", "loss", "clips", "epochs", "batch", "decay", "weight_decay", "held_out", "grad_clip", "ranks"}
    assert tuned <= set(written[1]["lowrank"])


def test_the_page_on_qllm_names_every_row():
    page = (Path(__file__).parent.parent / "docs/qllm.md").read_text()
    assert set(re.findall(r"--recipe (paper/\S+)", page)) <= set(recipe_names())
    assert all(f"`{model}`" in page for model in QLLM_MODELS)


def test_a_bare_off_is_a_word_on_the_command_line_and_in_yaml():
    recipe = with_settings(load_recipe("affinequant"), ["affinequant.qkv=off"])
    assert options(recipe, "affinequant").qkv == "off"
    recipe = recipe_from_dict(yaml.safe_load("steps: [affinequant: {channels: off}, rtn]"), "mine")
    assert options(recipe, "affinequant").channels == "off"


@pytest.mark.parametrize("mover", ["smoothquant", "awq", "affinequant"])
@pytest.mark.parametrize("first", [{"reassemble": {"sites": "all"}}, {"affinequant": {"qkv": "matrix"}}])
def test_nothing_moves_maps_past_what_stays_after_a_norm(first, mover):
    with pytest.raises(LowbitError, match=f"{mover} cannot come after {next(iter(first))}.*put {mover} first"):
        recipe_from_dict({"steps": [first, mover, "rtn"]}, "mine")
    recipe_from_dict({"steps": [{next(iter(first)): {}}, mover, "rtn"]}, "mine")  # where all merges, it may
    recipe_from_dict({"steps": [mover, first, "rtn"]}, "mine")


def test_nothing_moves_maps_past_an_order_that_depends_on_the_inputs():
    recipe = recipe_from_dict({"steps": ["rptq", "awq", "rtn"]}, "mine")
    recipe.check_order(parse_scheme("w4a16").act)
    with pytest.raises(LowbitError, match="awq cannot come after rptq"):
        recipe.check_order(parse_scheme("w4a8-static32").act)


@pytest.mark.parametrize("first", ["refit", "lowrank", "lkd"])
@pytest.mark.parametrize("last", ["qronos", {"gptq": {"target": "output"}}])
def test_weights_are_corrected_for_quantized_inputs_once(first, last):
    with pytest.raises(LowbitError, match=f"{first} and (qronos|gptq with target: output) both correct weights"):
        recipe_from_dict({"steps": [first, last]}, "mine")
    recipe_from_dict({"steps": [first, "gptq"]}, "mine")


@pytest.mark.parametrize("first", ["refit", "lowrank", "lkd"])
def test_codes_are_not_learned_towards_a_function_that_a_step_has_changed(first):
    with pytest.raises(LowbitError, match=rf"{first} corrects the block's float function.*set rounding\.correct=1"):
        recipe_from_dict({"steps": [first, "rounding"]}, "r")
    recipe_from_dict({"steps": [first, {"rounding": {"correct": 1}}]}, "r")
    recipe_from_dict({"steps": ["awq", "rounding"]}, "r")


def test_zeros_are_not_tuned_away():
    with pytest.raises(LowbitError, match="tune would take sparsegpt's zeros away"):
        recipe_from_dict({"steps": ["sparsegpt", "tune"]}, "mine")


@pytest.mark.parametrize("value", ["2020-13-45", "[" * 3000])
def test_a_value_that_yaml_fails_on_is_one_line(value):
    with pytest.raises(LowbitError, match=r"--set rtn.search=.*is not valid YAML"):
        with_settings(load_recipe("rtn"), [f"rtn.search={value}"])


@pytest.mark.parametrize("name", [n for n in recipe_names() if "omniquant" in n or n.startswith("paper/affinequant")])
def test_what_the_papers_have_not_is_off_in_their_recipes(name):
    assert options(load_recipe(name), "affinequant").signs is False
