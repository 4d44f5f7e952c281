"""A process of a job is killed at a random moment: a clean end, and a resumed run with the bytes of any other.

A moment is a number of finished blocks and a time behind the last of them, so that it falls into the run on a busy
machine too.

``LOWBIT_KILLS`` is the number of kills, ``LOWBIT_KILL_SEED`` draws other moments.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from forked_job import ended, errors_of, job
from runs import folder_bytes
from tiny import save_tiny

pytestmark = pytest.mark.heavy  # starts processes

KILLS = int(os.environ.get("LOWBIT_KILLS", "4"))
SEED = int(os.environ.get("LOWBIT_KILL_SEED", "0"))
TIMEOUT = 60.0  # seconds of LOWBIT_TIMEOUT: an end long after it would be a hang
SLACK = 240.0  # seconds that an end may take on a machine that is busy with other work
BLOCKS = 4  # of the model
SIZES = (2, 1, 2, 3)  # of resumed jobs, in turn: half of them with another number


def arguments(model: Path, out: Path) -> list[str]:
    text = ["--data", str(model / "calib.txt"), "--samples", "12", "--length", "16"]
    steps = ["--recipe", str(model / "recipe.yaml"), "--scheme", "w4a8"]
    return ["quantize", str(model), "--out", str(out), *steps, *text]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kills") / "model"
    save_tiny(place, "llama", num_hidden_layers=BLOCKS)
    (place / "recipe.yaml").write_text("steps: [smoothquant, {gptq: {target: output}}]\n")
    return place


def uninterrupted(model: Path) -> tuple[dict[str, bytes], float]:
    """The files of a run by two processes, and how long it takes when the server of processes is at work already."""
    place = model.parent
    assert ended(job([["recipes"]], place / "started"), SLACK) == [0]
    began = time.monotonic()
    codes = ended(job([arguments(model, place / "whole")] * 2, place / "whole-said"), SLACK)
    duration = time.monotonic() - began
    assert codes == [0, 0], errors_of(place / "whole-said")
    return folder_bytes(place / "whole"), duration


def finished_blocks(out: Path) -> int:
    return len(list(out.glob("block-*.safetensors")))


def killed_and_resumed(model: Path, kill: int, wanted: dict[str, bytes], duration: float) -> str:
    """One kill, in words, after which the end was clean and the resumed run gave the ``wanted`` files."""
    chance, out, said = random.Random(1000 * SEED + kill), model.parent / f"{kill}", model.parent / f"{kill}-said"
    rank, behind, moment = chance.randrange(2), chance.randrange(BLOCKS), chance.random() / BLOCKS
    processes = job([arguments(model, out)] * 2, said, TIMEOUT)
    while finished_blocks(out) < behind and processes[rank].exitcode is None:
        processes[rank].join(0.005)
    processes[rank].join(moment * duration)
    killed, blocks = processes[rank].exitcode is None, finished_blocks(out)
    processes[rank].kill()
    codes, errors = ended(processes, TIMEOUT + SLACK), errors_of(said)
    when = f"{moment:.2f} of {duration:.1f} s behind {behind} blocks, at {blocks}"
    facts = f"kill {kill} of process {rank}, {when}: {codes}, {errors}"
    assert None not in codes, f"hangs: {facts}"
    if killed:
        finished = (out / "lowbit.json").exists() and codes[1 - rank] == 0
        assert finished or (codes[1 - rank] == 2 and len(errors) == 1), facts
    size = SIZES[kill % len(SIZES)]
    assert ended(job([arguments(model, out)] * size, said), SLACK) == [0] * size, (facts, errors_of(said))
    assert folder_bytes(out) == wanted, facts
    shutil.rmtree(out)
    return f"process {rank} killed" if killed else "finished before"


def test_a_process_killed_at_any_moment_ends_the_job_and_a_resumed_one_has_the_same_bytes(model: Path) -> None:
    wanted, duration = uninterrupted(model)
    outcomes = Counter(killed_and_resumed(model, kill, wanted, duration) for kill in range(KILLS))
    print(f"{KILLS} kills: {dict(outcomes)}, every end clean, every resumed run the same bytes")
    assert outcomes["finished before"] <= KILLS // 2
