"""What the command line says before it works: help, the version, recipes, schemes, the demo."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml

from lowbit.cli import demo
from lowbit.cli.main import app, call
from lowbit.cli.targets import patterns, scheme_name
from lowbit.errors import LowbitError
from lowbit.exporters import EXPORTERS
from lowbit.exporters.gguf_native import NATIVE
from lowbit.pipeline.recipe import load_recipe, recipe_names
from lowbit.pipeline.request import DEFAULTS
from lowbit.quant.integer import IntFormat
from lowbit.quant.layouts import LAYOUTS, layout_of
from lowbit.quant.runtimes import RUNTIMES
from lowbit.quant.scheme_names import (
    ACT_BITS,
    GRAMMAR,
    KV_BITS,
    NAMED,
    OVERRIDE_GRAMMAR,
    WEIGHT_BITS,
    WEIGHTS,
    override_text,
    parse_override,
    parse_scheme,
)

ROOT = Path(__file__).parent.parent
COMMANDS = typer.main.get_command(app).commands


@pytest.fixture
def command(capsys):
    """Runs a command that succeeds and says nothing on standard error: its standard output."""

    def run_command(*given: str) -> str:
        capsys.readouterr()
        assert call(list(given)) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run_command


def squeezed(text: str) -> str:
    """Without white space: help is wrapped to the terminal."""
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize(
    "command", [name for name, made in COMMANDS.items() if any(p.name == "out" for p in made.params)]
)
def test_what_is_written_is_named_the_same_way_everywhere(command):
    (out,) = [option for option in COMMANDS[command].params if option.name == "out"]
    assert set(out.opts) == {"--out", "-o"}


@pytest.mark.parametrize("width", ["60", "80", "200"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_text_is_printed_whole(name, width, command, monkeypatch):
    """Rich markup would swallow what stands in [brackets]."""
    monkeypatch.setenv("COLUMNS", width)
    out = squeezed(command(name, "--help"))
    texts = [COMMANDS[name].help, *(param.help for param in COMMANDS[name].params)]
    assert all(texts), "an option without help"
    for text in texts:
        assert squeezed(text) in out


def test_the_help_of_quantize_has_the_whole_grammar_and_where_names_are_listed(command):
    out = squeezed(command("quantize", "--help"))
    assert GRAMMAR in out
    assert "lowbitschemes" in out


def test_the_list_of_commands_has_each_with_a_line_that_is_not_cut(command):
    out = command("--help")
    assert set(re.findall(r"^  ([a-z]+)  ", out, re.M)) == set(COMMANDS)
    assert "..." not in out.partition("Commands:")[2]


def test_defaults_in_help_are_those_that_count():
    params = {param.name: param for param in COMMANDS["quantize"].params}
    assert {key: params[key].show_default for key in DEFAULTS} == {key: str(value) for key, value in DEFAULTS.items()}


def test_the_version(command):
    lines = command("--version").splitlines()
    assert lines[0] == f"lowbit {importlib.metadata.version('lowbit')}"
    for package in ("torch", "transformers", "compressed-tensors", "numpy"):
        assert f"{package} {importlib.metadata.version(package)}" in lines
    assert any(line.startswith("python 3.") for line in lines)
    assert lines[-1].startswith("on ")


def test_recipes_lists_each_with_a_line_and_its_schemes(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    out = command("recipes")
    for name in recipe_names():
        if name.startswith("paper/"):
            assert name not in out
            continue
        recipe = load_recipe(name)
        said = f"{re.escape(recipe.description)}\n +for: {re.escape(recipe.schemes)}$"
        assert recipe.description
        assert recipe.schemes
        assert re.search(rf"^{re.escape(name)} +{said}", out, re.M)
    papers = [name for name in recipe_names() if name.startswith("paper/")]
    assert re.search(rf"^paper/ +{len(papers)} recipes of published results", out, re.M)


@pytest.mark.parametrize("name", [name for name in recipe_names() if "/" not in name])
def test_the_schemes_that_a_recipe_names_are_schemes(name):
    for word in re.findall(r"\bw\d\w*(?:-\w+)?", load_recipe(name).schemes):
        parse_scheme(word)


def test_recipes_of_papers_are_listed_when_asked_for(command):
    papers = [name for name in recipe_names() if name.startswith("paper/")]
    out = command("recipes", "paper/")
    assert [name for name in papers if not re.search(rf"^{re.escape(name)} ", out, re.M)] == []
    assert [one["name"] for one in json.loads(command("recipes", "paper", "--json"))] == papers


@pytest.mark.parametrize("name", ["gptq", "affinequant+qllm", "paper/affinequant-opt-125m-w3a16"])
def test_a_recipe_is_shown_as_a_recipe_file_with_every_option(name, command, tmp_path):
    (tmp_path / "shown.yaml").write_text(command("recipes", name))
    recipe, shown = load_recipe(name), load_recipe(str(tmp_path / "shown.yaml"))
    assert (shown.steps, shown.window, shown.run) == (recipe.steps, recipe.window, recipe.run)
    assert (shown.description, shown.schemes) == (recipe.description, recipe.schemes)
    content = json.loads(command("recipes", name, "--json"))
    assert content.pop("name") == name
    assert content == yaml.safe_load((tmp_path / "shown.yaml").read_text())


def test_an_unknown_recipe_is_one_line(capsys):
    assert call(["recipes", "gtpq"]) == 2
    assert "did you mean 'gptq'" in capsys.readouterr().err


def test_the_text_of_a_recipe_is_checked_and_no_part_of_what_it_is(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("description: 3\nsteps: [rtn]\n")
    assert call(["recipes", str(tmp_path / "mine.yaml")]) == 2
    assert "recipe 'mine': description: 3 given; a word is allowed" in capsys.readouterr().err
    (tmp_path / "rtn.yaml").write_text("description: mine\nsteps: [rtn]\n")
    assert load_recipe(str(tmp_path / "rtn.yaml")) == load_recipe("rtn")


def test_the_grammar_is_that_of_the_parser():
    acts, kv = (",".join(map(str, allowed)) for allowed in ((*ACT_BITS, "fp8"), KV_BITS))
    written = f"w{{2..8}}a{{{acts}}}[kv{{{kv}}}[h]][g{{n}}][-sym|-asym|-sym-asym][-static[n]]"
    assert written == GRAMMAR
    assert (WEIGHT_BITS[0], WEIGHT_BITS[-1]) == (2, 8)
    assert OVERRIDE_GRAMMAR == "w{2..8}[g{n}][-sym|-asym]"


@pytest.fixture(scope="module")
def listed() -> dict[str, Any]:
    """What ``lowbit schemes --json`` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert call(["schemes", "--json"]) == 0
    return json.loads(out.getvalue())


def test_schemes_explains_names_overrides_and_targets(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = command("schemes")
    for said in (GRAMMAR, OVERRIDE_GRAMMAR, "--override", *EXPORTERS, *RUNTIMES, "w4a16g64-sym"):
        assert said in out
    for name in (*NAMED, *WEIGHTS):
        assert re.search(rf"^│ {re.escape(name)} ", out, re.M), name


def test_the_json_of_schemes_has_the_grammar_and_examples(listed):
    assert listed["grammar"] == GRAMMAR
    assert set(listed["parts"]) == {"w4", "a8", "afp8", "kv4", "kv4h", "g64", "-sym, -asym", "-sym-asym", "-static"}
    for example in listed["examples"]:
        assert parse_scheme(example["scheme"]).name == example["scheme"]
    found = {row["scheme"]: row for row in listed["examples"]}
    assert list(found["w4a8g64-sym-asym"].values())[1:] == ["4 bits sym", "8 bits asym", "float", "4.250"]
    assert list(found["w4afp8g64"].values())[1:] == ["4 bits sym", "E4M3, per token", "float", "4.250"]


def test_schemes_lists_every_named_scheme_and_what_loads_it(listed):
    rows = {row["scheme"]: row for row in listed["named"]}
    assert list(rows) == list(NAMED)
    assert {row["bits_per_weight"] for row in rows.values() if row["weights"] == "mxfp4"} == {"4.250"}
    facts = ("inputs", "layout", "transformers")
    assert [rows["mxfp4a8"][key] for key in facts] == ["E4M3, groups of 32", "mxfp4-pack-quantized", "bfloat16"]
    assert [rows["fp8"][key] for key in facts] == ["E4M3, per token", "float-quantized", "float32"]
    assert [rows["q4_k"][key] for key in facts] == ["float", "lowbit-packed", None]
    assert "llama.cpp" in rows["q4_k"]["why_not"]
    for name, row in rows.items():
        assert (row["transformers"] is None) == (row["why_not"] is not None)
        for target in listed["targets"]:
            assert (name in target["schemes"]) == (target["name"].partition(" ")[0] in row["exports"]), name


def test_schemes_lists_every_format_that_an_override_may_name(listed):
    rows = {row["name"]: list(row.values())[1:] for row in listed["formats"]}
    assert list(rows) == list(WEIGHTS)
    assert all(override_text(parse_override(name)) == name for name in rows)
    assert rows["q2_k"] == ["2 bits from a minimum", "4 bits x float16 of 256, groups of 16", 256, "2.625"]
    assert rows["fp8-block"] == ["E4M3", "bfloat16, tiles of 128 x 128", 1, "8.001"]
    for name, (*_, unit, _) in rows.items():
        assert all(WEIGHTS[name].groups(unit * times) >= 1 for times in (1, 3))
        if unit > 1:
            with pytest.raises(LowbitError, match="do"):
                WEIGHTS[name].groups(unit // 2)


def test_the_page_of_formats_has_the_facts_of_every_format(listed):
    page = (ROOT / "docs/formats.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    rows = {row[0].strip("`"): row[1:] for row in cells if len(row) == 7}
    loads = {row["weights"]: row["transformers"] or "no" for row in listed["named"]}
    for row in listed["formats"]:
        codes, _, bits, unit, dtype, kind = rows[row["name"]]
        assert codes == row["codes"]
        assert bits == row["bits_per_weight"]
        assert int(unit.split()[0]) == row["widths"]
        assert dtype == loads.get(row["name"], dtype)
        native = NATIVE.get(row["name"])
        assert kind.partition(";")[0] == (
            native.name if native else "none" if kind else ""
        )  # "none; BF16": as floats
    assert loads.keys() <= rows.keys()


def test_the_page_of_schemes_has_the_grammar_and_every_name():
    page = (ROOT / "docs/schemes.md").read_text()
    assert GRAMMAR in page
    for name in NAMED:
        assert f"`{name}`" in page, name


def test_the_page_of_run_folders_has_every_layout():
    page = (ROOT / "docs/run-folder.md").read_text()
    table = page.partition("## Layouts")[2].partition("## Loading")[0]
    assert sorted(re.findall(r"^\| `([a-z0-9-]+)` \|", table, re.M)) == sorted(LAYOUTS)
    for name in LAYOUTS:
        (line,) = (line for line in table.splitlines() if line.startswith(f"| `{name}`"))
        for format, outside in product((*WEIGHTS.values(), IntFormat(4, 32, symmetric=False)), (False, True)):
            if layout_of(format, outside=outside).name == name:
                beside = set(LAYOUTS[name].tensors(format)) - {"weight_scale"}
                assert beside <= set(re.findall(r"`(\w+)`", line)), (name, format.name)


def test_targets_list_inputs_in_fp8_where_they_are_supported():
    key = ("fp8", None, "-sym")
    assert scheme_name(key, 64, 4) == "w4afp8g64-sym"
    assert list(patterns([(key, None, 4), (("8", None, "-sym"), None, 4)])) == ["w4a{8,fp8}-sym"]


def expanded(pattern: str) -> set[str]:
    """The scheme names that a pattern stands for, of groups 64 and none; a name stands for itself."""
    if pattern in NAMED:
        return {pattern}
    head = re.match(r"(w[^a]+)(a(?:\{[^}]*\}|\d+|fp8))(kv\d)?(.*?)((?:-sym-asym|-a?sym)?(?:-static)?)$", pattern)
    assert head, pattern
    weights, acts, kv, group, suffix = head.groups()

    def values(text: str) -> list[str]:
        text = text.strip("wa{}")
        low, dots, high = text.partition("..")
        return [str(n) for n in range(int(low), int(high) + 1)] if dots else text.split(",")

    groups = [""] if not group or group.startswith("[") else []
    groups += ["g64"] if "g{n}" in group or "64" in group else []
    return {f"w{w}a{a}{kv or ''}{g}{suffix}" for w in values(weights) for a in values(acts) for g in groups}


def test_what_targets_are_said_to_take_is_what_they_take(listed):
    """Asked again of the exporters, for a few schemes that stand for a kind each."""
    takes = {one["name"].split(" or ")[0]: one for one in listed["targets"]}
    names = {target: set().union(*map(expanded, one["schemes"])) for target, one in takes.items()}
    assert set(takes) == set(EXPORTERS)
    assert {"w4a16g64-sym", "w4a16g64-asym"} <= names["awq"]
    assert not {"w3a16g64-sym", "w4a8-sym"} & names["awq"]
    assert {"w3a16-sym", "w8a16g64-asym"} <= names["gptq"]
    assert "w5a16-sym" not in names["gptq"]
    assert "w8a16g64-asym" not in names["gguf"]
    assert {"w4a16g64-sym", "w8a8-sym"} <= names["vllm"]
    static = {"w8a8-static", "w4a16g64-sym-static", "w4a8g64-asym-static"}
    assert takes["onnx"]["needs"] or {*static, "fp8a16"} <= names["onnx"]
    assert not {"w8a8g64-static", "fp8", "nvfp4"} & names["onnx"]
    assert not static & names["gguf"]
    for runtime in RUNTIMES.values():
        wanted = {name for name in runtime.schemes if not re.search(r"g(?!64)", name)}
        assert takes[runtime.target]["needs"] or wanted <= names[runtime.target]


def test_a_target_whose_package_is_missing_says_what_to_install(command, monkeypatch):
    from lowbit.cli import targets
    from lowbit.errors import MissingExtra

    real = targets.exporter_of

    def one_missing(name: str) -> object:
        if name == "onnx":
            raise MissingExtra("onnx", "onnx", "--to onnx")
        return real(name)

    monkeypatch.setattr(targets, "exporter_of", one_missing)
    told = {one["name"]: one for one in json.loads(command("schemes", "--json"))["targets"]}
    assert told["onnx or onnxruntime"]["schemes"] == []
    assert "pip install 'lowbit[onnx]'" in told["onnx or onnxruntime"]["needs"]
    assert "pip install" in command("schemes")


@pytest.fixture
def staged(monkeypatch, tmp_path):
    """The demo with its work left out: what quantize was called with."""
    calls = []

    def quantize(model, out, **options):
        calls.append((model, out.name, options))
        out.mkdir()
        (out / "x.safetensors").write_bytes(b"x")
        return SimpleNamespace(bits_per_weight=4.25, seconds=75.0)

    perplexity = iter([26.7, 40.7, 31.8])
    evaluated = []

    def evaluate(folder, **options):
        evaluated.append(options)
        return SimpleNamespace(perplexity={"builtin": next(perplexity)})

    monkeypatch.setattr("lowbit.pipeline.quantize.quantize", quantize)
    monkeypatch.setattr("lowbit.evaluation.evaluate.evaluate", evaluate)
    monkeypatch.setattr("lowbit.evaluation.generate.generate_text", lambda folder, prompt, tokens: f"{prompt}\n\nto")
    monkeypatch.setattr("lowbit.checkpoints.resolve.resolve", lambda name: SimpleNamespace(folder=tmp_path / "float"))
    files = SimpleNamespace(files=[Path(__file__)])
    monkeypatch.setattr("lowbit.checkpoints.safetensors_folder.Checkpoint", lambda folder: files)
    return calls, evaluated


def test_the_demo_shows_what_was_done_and_what_to_do_next(staged, tmp_path, capsys):
    out = tmp_path / "demo"
    assert call(["demo", "--out", str(out)]) == 0
    told, said = capsys.readouterr()
    text = " ".join(told.split())
    for row in ("float │ float32 │ 32.000", "rtn │ w4a16g64-sym │ 4.250", "affinequant+gptq │ w4a16g64-sym │ 4.250"):
        assert row in text
    for part in ("26.70", "40.70", "31.80", "75 s", f"rtn: {demo.PROMPT} to"):
        assert part in text
    assert f"perplexity on {demo.EVALUATED:,} tokens" in text
    assert f"calibration on {demo.SAMPLES} windows of {demo.LENGTH} tokens" in text
    assert f"AffineQuant for {demo.EPOCHS} epochs" in text
    squeezed_text = squeezed(told)
    for line in (f"lowbit export {out} --to gguf", f"lowbit verify {out} {out}.gguf", f"lowbit report {out} -o"):
        assert squeezed(line) in squeezed_text
    assert "quantizing with affinequant+gptq" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]


def test_the_demo_refuses_a_folder_without_a_name_before_any_work(staged, capsys, monkeypatch):
    monkeypatch.setattr("lowbit.checkpoints.resolve.resolve", lambda name: pytest.fail("work has begun"))
    assert call(["demo", "-o", "/"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--out / given, which has no name: name a folder to be made, such as demo-run" in line


def test_the_demo_does_what_its_protocol_says(staged, tmp_path, capsys):
    calls, evaluated = staged
    assert call(["demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["recipe"] for row in found["rows"]] == ["float", "rtn", "affinequant+gptq"]
    assert [options["recipe"] for _, _, options in calls] == ["rtn", "affinequant+gptq"]
    for _, _, options in calls:
        assert (options["samples"], options["length"]) == (demo.SAMPLES, demo.LENGTH)
    assert calls[1][2]["settings"] == [f"affinequant.epochs={demo.EPOCHS}"]
    assert all((one["length"], one["tokens"]) == (demo.WINDOW, demo.EVALUATED) for one in evaluated)
