"""``evaluate``, ``compare`` and tasks in several processes: the figures of one, to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from test_processes import launched, lines_of
from tiny import quantized, save_tiny

pytestmark = pytest.mark.heavy  # starts processes that import torch

VARIES = {"seconds"}  # of a result, and of a task's row


def told(size: int, *command: str, **environment: str) -> dict[str, Any]:
    """What a command prints as JSON, in a number of processes."""
    process = launched(size, "-m", "lowbit", *command, "--json", **environment)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return without_times(json.loads(out))


def without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_times(value) for name, value in content.items() if name not in VARIES}
    return [without_times(value) for value in content] if isinstance(content, list) else content


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measure")
    quantized(folder, "w3a8")
    (folder / "other.txt").write_text((folder / "model" / "calib.txt").read_text()[7:900])
    return folder


def test_figures_do_not_depend_on_the_number_of_processes(place: Path) -> None:
    run, model, texts = str(place / "run"), str(place / "model"), []
    for name in ("model/calib.txt", "other.txt"):
        texts += ["--data", str(place / name)]
    sizes = ["--length", "40", "--tokens", "1100"]  # 27 windows and 22: seven and six batches
    commands = (
        ["evaluate", run, *texts, *sizes, "--reference", model],
        ["compare", model, run, *texts, *sizes, "--prompt", "abc", "--new-tokens", "4"],
    )
    for command in commands:
        alone = told(1, *command)
        assert told(3, *command) == alone, command[0]
    assert len(set(alone["texts"][str(place / "other.txt")]["runs"][0]["block_error"])) > 1


def test_scores_of_tasks_do_not_depend_on_the_number_of_processes(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [
        {
            "goal": f"press {number}",
            "sol1": "a" * (number % 7 + 1),
            "sol2": "b" * (number % 5 + 1),
            "label": number % 2,
        }
        for number in range(60)
    ]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", str(place / "run"), "--tasks", "piqa", "--task-data", str(tmp_path), "--fresh"]
    alone = told(1, *command, LOWBIT_CACHE=str(tmp_path / "cache"))
    assert told(2, *command, LOWBIT_CACHE=str(tmp_path / "cache")) == alone
    cached = told(2, *command[:-1], LOWBIT_CACHE=str(tmp_path / "cache"))
    assert cached == alone
    assert alone["zero_shot"]["tasks"]["piqa"]["documents"] == 60


def test_processes_with_other_models_are_refused(tmp_path: Path) -> None:
    """Each process has a working folder of its own, with another model of the same name."""
    for rank in range(2):
        save_tiny(tmp_path / f"{rank}" / "model", "llama", seed=rank)
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, runpy, sys\n"
        f"os.chdir(os.path.join({str(tmp_path)!r}, os.environ['RANK']))\n"
        "sys.argv = ['lowbit', 'evaluate', 'model', '--data', 'model/calib.txt', '--length', '16']\n"
        "runpy.run_module('lowbit', run_name='__main__')\n"
    )
    process = launched(2, str(worker))
    _out, errors = process.communicate(timeout=600)
    assert process.returncode != 0
    assert len(lines_of(errors)) == 1
    assert "process 1 has model" in lines_of(errors)[0]
