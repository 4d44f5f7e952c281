"""Whatever is given in place of what a command takes: one line that says what it is and which command takes it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import lowbit
from lowbit.checkpoints.kinds import what_is
from lowbit.cli.main import call
from runs import quantize_tiny
from tiny import save_tiny

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

OTHER = r"'lowbit verify RUN .*' compares it with its run; give the run folder or the float model"
# By name: what a command that takes a model says of it, and what ``what_is`` calls it.
THINGS = {
    "gemma": (r"already quantized \('gemma'\)", "an export or another tool's quantized model (gemma)"),
    "onnx": (f"is an ONNX export: {OTHER}", "an ONNX export"),
    "executorch": (f"is an ExecuTorch export: {OTHER}", "an ExecuTorch export"),
    "x.pte": (f"is an ExecuTorch program: {OTHER}", "an ExecuTorch program"),
    "x.onnx": (f"is an ONNX graph: {OTHER}", "an ONNX graph"),
    "x.safetensors": ("is a file of weights: give its folder", "a file of weights"),
    "x.txt": (r"is a file; allowed are a \.gguf file, a model's folder, a hub id, 'demo'", None),
    "unfinished": (
        "holds an unfinished run: repeat its 'lowbit quantize' command",
        "the folder of an unfinished run",
    ),
    "adapter": (r"is a PEFT adapter of org/base: 'lowbit merge .*/adapter --base MODEL --out DIR'", "a PEFT adapter"),
    "diffusers": ("is a diffusers pipeline: give the folder of a causal language model", "a diffusers pipeline"),
    "sentences": ("is a sentence-transformers folder: .*one of its subfolders", "a sentence-transformers folder"),
    "author's": (
        "is a checkpoint in its author's own format: give its edition",
        "a checkpoint in its author's own format",
    ),
    "parent": ("has no config.json, so it is not a model folder: did you mean .*parent/model", None),
    "empty": ("has no config.json, so it is not a model folder$", None),
}
# These are models too.
QUANTIZED = {
    "gptq": "an export or another tool's quantized model (gptq)",
    "vllm": "an export or another tool's quantized model (compressed-tensors)",
    "awq": "an export or another tool's quantized model (awq)",
}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("things")
    save_tiny(root / "m", "llama", num_hidden_layers=1)
    run = quantize_tiny(root / "m", root / "run", "w4a16g32-sym").out
    lowbit.export(run, "gptq", out=root / "gptq")
    lowbit.export(run, "vllm", out=root / "vllm")
    lowbit.export(quantize_tiny(root / "m", root / "asym", "w4a16g32-asym").out, "awq", out=root / "awq")
    identity = json.loads((run / "lowbit.json").read_text())["identity"]
    lowbit.export(quantize_tiny(root / "m", root / "rows", "w4a16-sym").out, "gemma", out=root / "gemma")
    texts = {
        "onnx/genai_config.json": "{}",
        "executorch/model.pte": "",
        "executorch/tokenizer.json": "{}",
        "unfinished/.run/identity.json": json.dumps(identity),
        "adapter/adapter_config.json": '{"base_model_name_or_path": "org/base"}',
        "diffusers/model_index.json": "{}",
        "sentences/modules.json": "[]",
        "author's/params.json": "{}",
        "parent/model/config.json": "{}",
        **dict.fromkeys(("x.pte", "x.onnx", "x.safetensors", "x.txt"), ""),
    }
    for name, content in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "empty").mkdir()
    shutil.copyfile(run / "block-00000.safetensors", root / "unfinished/block-00000.safetensors")
    return root


def refusal(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    assert call([str(word) for word in command]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


@pytest.mark.parametrize("name", THINGS)
def test_given_as_a_model(name: str, things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = things / name, things / "m/calib.txt"
    how = ("--data", text, "--length", 16)
    commands = (
        ("quantize", path, "--out", tmp_path / "out", *how, "--samples", 1),
        ("evaluate", path, *how, "--tokens", 64),
        ("compare", things / "m", path, *how, "--tokens", 64),
        ("compare", path, things / "run", *how, "--tokens", 64),
        ("inspect", path),
    )
    for command in commands:
        assert re.search(THINGS[name][0], refusal(capsys, *command)), command
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*THINGS, *QUANTIZED, "m", "nowhere"])
def test_given_as_a_run(name: str, things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = things / name
    what = {"m": "a float model", **QUANTIZED}.get(name, THINGS.get(name, ("", None))[1])
    assert what_is(path) == what
    expected = re.escape(f"is not a run folder{f' but {what}' if what else ''}: give the folder of a finished")
    if name == "unfinished":
        expected = "holds an unfinished run"
    for command in (
        ("export", path, "--to", "gptq", "--out", tmp_path / "out"),
        ("verify", path, things / "gptq", "--no-logits"),
        ("report", path, "--out", tmp_path / "page.html"),
    ):
        assert re.search(expected, refusal(capsys, *command)), command
    assert list(tmp_path.iterdir()) == []


def test_a_run_given_as_a_model_or_an_export(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, text = things / "run", things / "m/calib.txt"
    line = refusal(capsys, "quantize", run, "--out", tmp_path / "out", "--data", text)
    assert "is a run folder, which is quantized already: give its float model; 'lowbit evaluate'" in line
    assert "give the float model first" in refusal(capsys, "compare", run, run, "--data", text)
    assert "is a run folder, not an export in a known format" in refusal(capsys, "verify", run, run)
    assert "is a float model, not an export" in refusal(capsys, "verify", run, things / "m")


def test_a_run_without_its_config(things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(things / "run", run := tmp_path / "run")
    (run / "config.json").unlink()
    assert "has no config.json" in refusal(capsys, "evaluate", run, "--data", things / "m/calib.txt", "--length", 16)


def test_weights_beside_an_adapter(things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(things / "m", m := tmp_path / "m")
    (m / "adapter_config.json").write_text("{}")
    assert "if the weights beside it are the whole model, delete adapter_config.json" in refusal(capsys, "inspect", m)
