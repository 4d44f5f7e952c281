"""``evaluate``, ``compare`` and tasks in several processes: the figures of one, to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forked_job import ended, errors_of, job
from tiny import quantized, save_tiny

pytestmark = pytest.mark.heavy  # starts processes that import torch

SECONDS = 1200.0  # that a command may take on a busy machine
VARIES = {"seconds"}  # of a result, and of a task's row


def told(size: int, place: Path, *command: str, **environment: str) -> dict[str, Any]:
    """What a command prints as JSON, in a number of processes."""
    codes = ended(job([[*command, "--json"]] * size, place, SECONDS, **environment), SECONDS)
    assert codes == [0] * size, errors_of(place)
    assert not any((place / f"{rank}.out").read_text() for rank in range(1, size))
    return without_times(json.loads((place / "0.out").read_text()))


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


def test_figures_do_not_depend_on_the_number_of_processes(place: Path, tmp_path: Path) -> None:
    run, model, texts = str(place / "run"), str(place / "model"), []
    for name in ("model/calib.txt", "other.txt"):
        texts += ["--data", str(place / name)]
    sizes = ["--length", "40", "--tokens", "1100"]  # 27 windows and 22: seven and six batches
    commands = (
        ["evaluate", run, *texts, *sizes, "--reference", model],
        ["compare", model, run, *texts, *sizes, "--prompt", "abc", "--new-tokens", "4"],
    )
    for command in commands:
        alone = told(1, tmp_path / "1", *command)
        assert told(3, tmp_path / "3", *command) == alone, command[0]
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
    cache = str(tmp_path / "cache")
    alone = told(1, tmp_path / "1", *command, LOWBIT_CACHE=cache)
    assert told(2, tmp_path / "2", *command, LOWBIT_CACHE=cache) == alone
    cached = told(2, tmp_path / "cached", *command[:-1], LOWBIT_CACHE=cache)
    assert cached == alone
    assert alone["zero_shot"]["tasks"]["piqa"]["documents"] == 60


def test_processes_with_other_models_are_refused(tmp_path: Path) -> None:
    commands = []
    for rank in range(2):
        model = tmp_path / f"{rank}"
        save_tiny(model, "llama", seed=rank)
        commands.append(["evaluate", str(model), "--data", str(tmp_path / "0" / "calib.txt"), "--length", "16"])
    assert None not in (codes := ended(job(commands, tmp_path / "said", SECONDS), SECONDS))
    assert 0 not in codes
    (line,) = errors_of(tmp_path / "said")
    assert "process 1 has model" in line
    assert "start all processes with the same command, model and installed versions" in line
