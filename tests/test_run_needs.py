"""Of a finished run only what is needed is needed, wherever it lies and whatever lies beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from runs import quantize_tiny
from tiny import save_tiny, tiny_ids

OPTIONAL = (
    "README.md",
    "lowbit-observed.safetensors",
    "lowbit-timing.json",
    "generation_config.json",
    "chat_template.jinja",
    "lowbit-evaluations.json",
)
NEEDED = {
    "config.json": "lacks config.json",
    "model.safetensors.index.json": "lacks model.safetensors.index.json",
    "block-00001.safetensors": "lacks block-00001.safetensors",
    "model-rest.safetensors": "lacks model-rest.safetensors",
    "tokenizer.json": "lacks tokenizer.json",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its run and an export of that."""
    root = tmp_path_factory.mktemp("finished")
    save_tiny(root / "m", "llama", num_hidden_layers=2)
    (root / "m/chat_template.jinja").write_text("{{ messages }}")
    quantize_tiny(root / "m", root / "run", "w4a16g32-sym")
    text = str(root / "m/calib.txt")
    assert call(["evaluate", str(root / "run"), "--data", text, "--length", "16", "--tokens", "64"]) == 0
    lowbit.export(root / "run", "gptq")
    return root


def use_all(root: Path, run: Path, export: Path, out: Path) -> None:
    """Every command that takes a run folder."""
    text: dict[str, Any] = {"data": str(root / "m/calib.txt"), "length": 16, "tokens": 64}
    assert lowbit.verify(run, [export], logits=False)[0].ok
    made = lowbit.export(run, "gptq", out=out / "again")
    assert lowbit.verify(run, [made.out], logits=False)[0].ok
    lowbit.report([run], out=out / "page.html")
    lowbit.evaluate(str(run), **text)
    lowbit.compare(str(root / "m"), str(run), **text)
    lowbit.diagnose(run)
    with torch.no_grad():
        lowbit.load(run)(tiny_ids(1, 8))
    again = quantize_tiny(root / "m", run, "w4a16g32-sym")
    assert again.manifest.files
    assert call(["inspect", str(run)]) == 0
    assert call(["generate", str(run), "--prompt", "abc", "--tokens", "2"]) == 0


@pytest.mark.parametrize("name", [*OPTIONAL[:2], "all of them"])
def test_a_run_without(name: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", run := tmp_path / "run")
    shutil.copytree(finished / "run-gptq", export := tmp_path / "export")
    for lost in OPTIONAL if name == "all of them" else (name,):
        (run / lost).unlink()
        (export / lost).unlink(missing_ok=True)
    use_all(finished, run, export, tmp_path)


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_needed_is_named(name: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", run := tmp_path / "run")
    (run / name).unlink()
    export = lambda: lowbit.export(run, "gptq")  # noqa: E731
    for ask in (export, lambda: lowbit.report([run], out=tmp_path / "page.html"), lambda: again(finished, run)):
        with pytest.raises(LowbitError, match=f"{run} {NEEDED[name]} of its finished run") as caught:
            ask()
        assert "\n" not in str(caught.value)
    if name != "tokenizer.json":  # the model alone does not need one
        with pytest.raises(LowbitError, match=name if name != "model.safetensors.index.json" else "neither"):
            lowbit.load(run)
    with pytest.raises(LowbitError, match=r"no tokenizer|lacks|neither|has no config\.json"):
        lowbit.evaluate(str(run), data=str(finished / "m/calib.txt"), length=16, tokens=64)
    assert not (tmp_path / "run-gptq").exists()


def again(root: Path, run: Path) -> object:
    return quantize_tiny(root / "m", run, "w4a16g32-sym")


def test_a_copy_elsewhere_among_other_files(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "Another Place (1)" / "Läuft.v2"
    shutil.copytree(finished / "run", run)
    for name in ("notes.md", ".DS_Store", "Thumbs.db", "extra.safetensors.tmp", "pytorch_model.bin", "other.json"):
        (run / name).write_text("x")
    for name in ("checkpoints", ".git", "logs"):
        (run / name).mkdir()
        (run / name / "config.json").write_text("{}")
    use_all(finished, run, finished / "run-gptq", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for this user")
def test_read_only_media(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", run := tmp_path / "media" / "run")
    for path in (*run.iterdir(), run, run.parent):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        use_all(finished, run, finished / "run-gptq", tmp_path)
        text = str(finished / "m/calib.txt")
        assert call(["evaluate", str(run), "--data", text, "--length", "16", "--tokens", "64"]) == 0
    finally:
        for path in (run.parent, run):
            path.chmod(0o755)


def test_nothing_is_written_into_a_finished_run_but_results(finished: Path, tmp_path: Path) -> None:
    """What a read-only medium would refuse, whoever the user is."""
    shutil.copytree(finished / "run", run := tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in [run, *run.iterdir()]}
    use_all(finished, run, finished / "run-gptq", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in [run, *run.iterdir()]} == before


def test_an_empty_folder_that_a_file_browser_opened_is_new(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.DS_Store").write_bytes(b"\x00")
    run = quantize_tiny(finished / "m", tmp_path / "run", "w4a16").out
    assert ".DS_Store" not in json.loads((run / "lowbit.json").read_text())["files"]


def test_a_manifest_lists_what_the_run_made(finished: Path) -> None:
    manifest = json.loads((finished / "run/lowbit.json").read_text())
    unlisted = {"lowbit.json", "lowbit-timing.json", "lowbit-evaluations.json"}
    assert set(manifest["files"]) == {path.name for path in (finished / "run").iterdir()} - unlisted
