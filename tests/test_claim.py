"""Processes that share a folder and nothing else: the bytes of one process, also where one of them dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lowbit
from claim_worker import run
from lowbit.errors import LowbitError
from lowbit.pipeline.recipe import recipe_from_dict
from lowbit.pipeline.runner import Walk
from lowbit.runs.folder import CLAIMS, RUN
from runs import folder_bytes
from tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("claim") / "m"
    save_tiny(folder, "llama", num_hidden_layers=4)
    return folder


def started(model: Path, out: Path, recipe: str, how: str = "") -> subprocess.Popen[str]:
    worker = str(Path(__file__).parent / "claim_worker.py")
    command = [sys.executable, worker, str(model), str(out), recipe, how]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE)


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["rtn", "awq"])
def test_three_processes_of_which_one_dies_make_what_one_makes(recipe, model, tmp_path):
    run(model, tmp_path / "one", recipe, claim=False)
    out, stuck = tmp_path / "out", tmp_path / "out.stuck"
    processes = [started(model, out, recipe, "stuck")]
    until = time.monotonic() + 300
    while not stuck.exists():
        assert time.monotonic() < until
        assert processes[0].poll() is None, processes[0].communicate()[1]
        time.sleep(0.05)
    assert [path.name for path in (out / CLAIMS).iterdir()] == ["block-00000"]
    processes.append(started(model, out, recipe))
    while not list(out.glob("block-*.safetensors")):  # it goes past the block that is taken
        assert time.monotonic() < until
        assert processes[1].poll() is None, processes[1].communicate()[1]
        time.sleep(0.05)
    assert not (out / "block-00000.safetensors").exists()
    processes.append(started(model, out, recipe))
    processes[0].send_signal(signal.SIGKILL)
    for process in processes[1:]:
        _out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert folder_bytes(out) == folder_bytes(tmp_path / "one")
    assert not (out / RUN).exists()


FLOAT = {"epochs": 1, "inputs": "float"}


@pytest.mark.parametrize(
    "steps", [["rtn"], ["awq", "rtn"], ["signs", "smoothquant", "rtn"], [{"affinequant": FLOAT}, "rtn"]]
)
def test_one_process_that_claims_makes_what_one_makes(steps, model, tmp_path):
    written: list[int] = []
    real, recipe, text = Walk.write, recipe_from_dict({"steps": steps}, "own"), str(model / "calib.txt")

    def write(self, block, *rest):
        written.append(block.start)
        real(self, block, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "write", write)
        for claim in (False, True):
            more = {"data": text, "samples": 6, "length": 12, "claim": claim}
            lowbit.quantize(str(model), tmp_path / str(claim), scheme="w4a8", recipe=recipe, **more)
    assert folder_bytes(tmp_path / "True") == folder_bytes(tmp_path / "False")
    assert written == [*range(4), *range(4)]


@pytest.mark.parametrize(
    ("recipe", "scheme", "step"),
    [("gptq", "w4a16g16-sym", "gptq"), ("affinequant", "w4a4", "affinequant"), ("rtn", "w8a8-static", "rtn")],
)
def test_blocks_that_depend_on_each_other_are_not_claimed(recipe, scheme, step, model, tmp_path):
    text = str(model / "calib.txt")
    with pytest.raises(LowbitError, match=f"--claim given: {step} of recipe {recipe} reads hidden states"):
        lowbit.quantize(
            str(model), tmp_path / "o", scheme=scheme, recipe=recipe, data=text, claim=True, samples=2, length=8
        )
    assert not (tmp_path / "o").exists()
