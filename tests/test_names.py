"""Names are found in any case, stored in their own spelling; messages say what to do, and blame nobody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lowbit
from lowbit.cli.main import call
from lowbit.data.text import corpus_name
from lowbit.errors import LowbitError, canonical
from lowbit.evaluation.tasks import task_names
from lowbit.exporters import target_name
from lowbit.pipeline.inspect import inspect_model
from lowbit.pipeline.machine import Rates
from lowbit.pipeline.recipe import load_recipe, recipe_names, with_effort, with_settings
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme_names import parse_override, parse_scheme
from tiny import save_tiny


def test_a_name_is_found_in_any_case():
    assert canonical("runtime", "vLLM", ["vllm", "onnx"]) == "vllm"
    assert canonical("field", "A", ["a", "A"]) == "A"
    with pytest.raises(LowbitError, match="unknown field 'bB'"):
        canonical("field", "bB", ["bb", "BB"])
    with pytest.raises(LowbitError, match="unknown runtime 'vlm': did you mean 'vllm'"):
        canonical("runtime", "vlm", ["vllm"])


@pytest.mark.parametrize("name", [*recipe_names()[:3], "paper/affinequant-opt-125m-w3a16"])
def test_recipes(name):
    assert load_recipe(name.upper()) == load_recipe(name)
    assert load_recipe(name.upper()).name == name


def test_steps_efforts_and_settings(tmp_path):
    (tmp_path / "Mine.YAML").write_text("steps: [AWQ, {GPTQ: {damping: 0.02}}]")
    recipe = load_recipe(str(tmp_path / "Mine.YAML"))
    assert [name for name, _ in recipe.steps] == ["awq", "gptq"]
    assert with_settings(recipe, ["Gptq.damping=0.05"]).steps[1][1].damping == 0.05
    assert with_effort(load_recipe("affinequant"), "QUICK") == with_effort(load_recipe("affinequant"), "quick")


def test_schemes_overrides_targets_tasks_and_texts():
    assert parse_scheme("W4A16G64-SYM") == parse_scheme("w4a16g64-sym")
    assert parse_scheme("W4A16G64-SYM").name == "w4a16g64-sym"
    assert parse_override("W8G64") == IntFormat(8, 64)
    assert parse_override("Float") is None
    assert [target_name(name) for name in ("GGUF", "Llama.cpp", "ONNXRuntime", "vLLM")] == [
        "gguf",
        "gguf",
        "onnx",
        "vllm",
    ]
    assert task_names("BoolQ,PIQA") == ["boolq", "piqa"]
    assert [corpus_name(name) for name in ("WikiText2", "C4", "Self", "C4.txt")] == [
        "wikitext2",
        "c4",
        "self",
        "C4.txt",
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("names") / "m"
    save_tiny(folder, "llama", num_hidden_layers=1)
    return folder


def test_a_run_stores_the_names_in_their_own_spelling(model, tmp_path):
    sizes = {"samples": 2, "length": 8}
    how = {"scheme": "W4A16G16-Sym", "recipe": "Rtn", "target": "VLLM", "effort": "Normal", "data": "SELF"}
    made = lowbit.quantize(str(model), tmp_path / "run", **how, **sizes)
    request = made.manifest.request
    assert [request[key] for key in ("scheme", "recipe", "target", "effort", "data")] == [
        "w4a16g16-sym", "rtn", "vllm", "normal", ["self"],
    ]  # fmt: skip
    plain = {key: value.lower() for key, value in how.items()}
    assert lowbit.quantize(str(model), tmp_path / "run", **plain, **sizes).manifest == made.manifest
    assert lowbit.export(tmp_path / "run", "vLLM").target == "vllm"
    assert (
        lowbit.evaluate(str(tmp_path / "run"), data=str(model / "calib.txt"), length=8, target="VLLM").target
        == "vllm"
    )


@pytest.mark.parametrize(
    ("widths", "options", "said"),
    [
        ({}, ["--scheme", "w4a16g64-sym"], ["width of 96; usable sizes: 16, 32"]),
        (
            {"intermediate_size": 100},
            ["--scheme", "w3a16g32-asym"],
            [
                "down_proj: group size 32 does not divide a width of 100; no size from 16 to 256 divides 64 and 100",
                "--scheme w3a16-asym",
                "--override '*.down_proj=w3-asym'",
            ],
        ),
        (
            {"intermediate_size": 100},
            ["--scheme", "w4a16", "--override", "*.down_proj=w8g64"],
            ["no size from 16 to 256 divides 100: use one scale per row, --override '*.down_proj=w8-sym'"],
        ),
        (
            {"hidden_size": 72, "intermediate_size": 100},
            ["--scheme", "w4a8g32"],
            ["q_proj: group size 32 does not divide a width of 72", "--scheme w4a8"],
        ),
        ({}, ["--scheme", "q4_k"], ["q_proj: q4_k needs widths in multiples of 256", "--override '*.q_proj=w8'"]),
        (
            {"intermediate_size": 104},
            ["--scheme", "w4a16", "--override", "*.mlp.down*=iq4_nl"],
            ["down_proj: iq4_nl needs widths in multiples of 32, and this one is 104", "'*.mlp.down*=w8'"],
        ),
        (
            {"intermediate_size": 104},
            ["--scheme", "mxfp8", "--override", "*.down_proj=w8"],
            ["inputs in mxfp8 have groups of 32, which do not divide a width of 104", "'*.down_proj=float'"],
        ),
    ],
)
def test_where_no_group_size_fits_the_message_says_what_does(widths, options, said, tmp_path, capsys):
    save_tiny(tmp_path / "m", "llama", num_hidden_layers=1, **widths)
    arguments = ["quantize", str(tmp_path / "m"), "--out", str(tmp_path / "run"), "--recipe", "rtn"]
    sizes = ["--data", str(tmp_path / "m" / "calib.txt"), "--samples", "1", "--length", "4"]
    capsys.readouterr()
    assert call([*arguments, *options, *sizes]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    for part in said:
        assert part in line
    if "--override '" in line and "--scheme w3a16-asym" in line:  # what it advises works
        assert call([*arguments, *sizes, "--scheme", "w3a16-asym"]) == 0
        arguments[3] = str(tmp_path / "other")
        assert call([*arguments, *sizes, *options, "--override", "*.down_proj=w3-asym"]) == 0


def test_a_width_without_a_size_is_said_by_the_format_too():
    with pytest.raises(LowbitError, match="a width of 100; none from 16 to 256 does: leave the group out"):
        IntFormat(4, 32).groups(100)


def test_inspect_takes_windows_that_the_model_has_positions_for(model, capsys, monkeypatch):
    """128 positions, and the default of 512 tokens in a window."""
    rates = Rates(1e9, 1e9, 1e9, 1e-6)  # measured, they differ between two calls
    monkeypatch.setattr("lowbit.pipeline.estimate.measured_rates", lambda rows, width: rates)
    given = {"samples": 32, "scheme": "w4a16", "recipe": "gptq"}
    assert inspect_model(str(model), **given) == inspect_model(str(model), **given, length=128)
    capsys.readouterr()
    assert call(["inspect", str(model), "--scheme", "w4a16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimated_memory_bytes"]
    assert call(["inspect", str(model), "--scheme", "w4a16", "--length", "129"]) == 2
    assert "--length is 129; this model's positions end at 128: give 128 or less" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_a_default_length_is_not_said_to_be_given(command, model, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), "--scheme", "w4a16"] if command == "quantize" else []
    capsys.readouterr()
    assert call([command, str(model), "--data", str(model / "calib.txt"), *out]) == 2
    line = capsys.readouterr().err
    assert "this model's positions end at 128: give 128 or less" in line
    assert "given" not in line
