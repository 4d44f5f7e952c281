"""Several processes under torchrun: the bytes of one, a line for an error, and no process that waits for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from job_worker import make
from runs import folder_bytes
from tiny import save_tiny

pytestmark = pytest.mark.heavy  # starts processes that import torch

SHARED = {"epochs": 2, "batch": 4, "micro_batch": 1, "held_out": 0.25}
RUNS = {
    "rtn": ("w4a16g16-sym", ["rtn"]),
    "smoothquant": ("w8a8", ["smoothquant", "rtn"]),
    "static": ("w8a8-static", ["smoothquant", "rtn"]),
    "awq": ("w4a16g16-sym", ["awq", "rtn"]),
    "gptq": ("w4a8kv4", ["gptq"]),
    "refit": ("w4a8", ["refit", "gptq"]),
    "output": ("w4a8", [{"gptq": {"target": "output"}}]),
    "affinequant": ("w4a4", [{"affinequant": SHARED}, "rtn"]),
    "qllm": ("w4a4", [{"reassemble": {"tries": 2}}, {"lowrank": SHARED}, "rtn"]),
    "rounding": ("w3a16g16-sym", [{"rounding": {**SHARED, "start": "gptq"}}]),
    "tune": ("w3a16g16-sym", ["gptq", {"tune": {**SHARED, "rank": 2, "epochs": 1}}]),
    "mixture": ("w4a16g16-sym", ["gptq"]),
    "wide": ("w4a16g16-sym", ["awq", {"gptq": {"block_size": 48}}]),
    "head": ("w4a16g16-sym", [{"gptq": {"head": True}}]),
}
OVERRIDES = {"head": {"lm_head": "w4g16"}}


def launched(size: int, *command: str, **environment: str) -> subprocess.Popen[str]:
    """A job of some processes, with one thread each, as torchrun starts it."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "LOWBIT_TIMEOUT": "120", **environment}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.Popen([*torchrun, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=own)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    save_tiny(place / "llama", "llama", num_hidden_layers=2)
    save_tiny(place / "mixtral", "mixtral", num_hidden_layers=2)
    save_tiny(place / "wide", "llama", num_hidden_layers=2, hidden_size=160, intermediate_size=336)
    return place


def runs_of(models: Path) -> list[dict]:
    model = {"mixture": "mixtral", "wide": "wide"}  # of which processes take rows of a weight
    return [
        {
            "name": name,
            "scheme": scheme,
            "steps": steps,
            "model": str(models / model.get(name, "llama")),
            "overrides": OVERRIDES.get(name, {}),
        }
        for name, (scheme, steps) in RUNS.items()
    ]


@pytest.fixture(scope="module")
def alone(models: Path) -> dict[str, dict[str, bytes]]:
    """By name, the files of a run by one process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for run in runs_of(models):
        make(run, run["model"], models / "1" / run["name"])
    torch.set_num_threads(before)
    return {name: folder_bytes(models / "1" / name) for name in RUNS}


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(size, models, alone):
    job = models / f"{size}.json"
    job.write_text(json.dumps({"runs": runs_of(models), "out": str(models / str(size))}))
    _out, errors = (process := launched(size, str(Path(__file__).parent / "job_worker.py"), str(job))).communicate()
    assert process.returncode == 0, errors
    for name, files in alone.items():
        found = folder_bytes(models / str(size) / name)
        assert [file for file in files if found.get(file) != files[file]] == [], name
        assert set(found) == set(files)


def test_a_job_resumes_with_another_number_of_processes(models, alone, tmp_path):
    (run,) = (run for run in runs_of(models) if run["name"] == "gptq")
    job, worker, out = tmp_path / "job.json", str(Path(__file__).parent / "job_worker.py"), tmp_path / "gptq"
    job.write_text(json.dumps({"runs": [run], "out": str(tmp_path), "stuck": True}))
    process = launched(2, worker, str(job))
    rank = next(p for p in workers(process, 2) if p.environ()["RANK"] == "1")
    until = time.monotonic() + 300
    while not (out / "block-00000.safetensors").exists():
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    rank.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (out / "block-00001.safetensors").exists()
    first = (out / "block-00000.safetensors").stat().st_ino
    shutil.copytree(out, tmp_path / "one")
    job.write_text(json.dumps({"runs": [run], "out": str(tmp_path)}))
    process = launched(3, worker, str(job))
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert (out / "block-00000.safetensors").stat().st_ino == first  # it is not written again
    assert folder_bytes(out) == alone["gptq"]
    make(run, run["model"], tmp_path / "one")
    assert folder_bytes(tmp_path / "one") == alone["gptq"]


def command(model: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--data", str(model / "calib.txt"), "--samples", "20", "--length", "12"]
    return ["-m", "lowbit", "quantize", str(model), "--out", str(out), "--scheme", "w4a4", *sizes, *more]


def lines_of(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("lowbit: ")]


def test_an_error_is_told_once(models, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("not a run")
    process = launched(2, *command(models / "llama", tmp_path / "other"))
    out, errors = process.communicate()
    assert process.returncode != 0
    assert not out
    assert len(lines_of(errors)) == 1
    assert "is not a lowbit run" in lines_of(errors)[0]


def test_a_program_goes_on_behind_an_error(models, alone, tmp_path):
    """An error of all processes, one that the first has alone, and one within the work; then a run like any other."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("not a run")
    (run,) = (run for run in runs_of(models) if run["name"] == "gptq")
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import json, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import lowbit
from job_worker import make
from lowbit.pipeline.runner import Walk

run, out = json.loads({json.dumps(json.dumps(run))}), Path({str(tmp_path)!r})
real = Walk.write

def broken(self, block, *rest):
    if os.environ["RANK"] == "0":
        raise ArithmeticError("one process alone")
    real(self, block, *rest)

for name, write in (("other", real), ("broken", broken), ("whole", real)):
    Walk.write = write
    try:
        make(run, run["model"], out / name)
        said = "done"
    except (lowbit.LowbitError, ArithmeticError, RuntimeError) as error:
        said = str(error)
    (out / f"{{name}}-{{os.environ['RANK']}}.txt").write_text(said)
"""
    )
    process = launched(2, str(script))
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    said = {(name, rank): (tmp_path / f"{name}-{rank}.txt").read_text() for name in ("other", "broken", "whole")
            for rank in (0, 1)}  # fmt: skip
    assert "is not a lowbit run" in said["other", 0]
    assert said["broken", 0] == "one process alone"
    assert said["broken", 1].startswith("another process of this job ended")
    assert not any("torch.distributed is initialized" in text for text in said.values())
    assert said["whole", 0] == said["whole", 1] == "done"
    assert folder_bytes(tmp_path / "whole") == alone["gptq"]


def test_a_command_that_is_not_shared_is_refused(models):
    process = launched(2, "-m", "lowbit", "inspect", str(models / "llama"))
    _out, errors = process.communicate()
    assert process.returncode != 0
    assert len(lines_of(errors)) == 1
    assert "'lowbit inspect', which one does alone" in lines_of(errors)[0]


@pytest.mark.parametrize(("wait", "patience"), [(6.0, 30.0), (60.0, 1.0)])
def test_an_error_before_the_processes_meet_is_told_however_late_the_first_one_is(wait, patience, models, tmp_path):
    """The first one still imports when the other has found what is wrong; or it hangs, and the other tells it."""
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys, time\n"
        f"time.sleep({wait} if os.environ['RANK'] == '0' else 0)\n"
        "from lowbit.cli import job\n"
        "from lowbit.cli.main import main\n"
        f"job.PATIENCE = {patience}\n"
        "main()\n"
    )
    began = time.monotonic()
    process = launched(2, str(script), "inspect", str(models / "llama"))
    _out, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = lines_of(errors)
    assert "'lowbit inspect', which one does alone" in line
    assert time.monotonic() - began < 55


LONG = (
    "--recipe",
    "affinequant",
    "--effort",
    "paper",
    "--set",
    "affinequant.epochs=100000",
    *("--set", "affinequant.patience=0"),
)


def workers(process: subprocess.Popen[str], size: int) -> list[psutil.Process]:
    """The processes of a job, when all of them are there."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = psutil.Process(process.pid).children()
        if len(found) == size:
            return found
        time.sleep(0.1)
    raise AssertionError("the job has not started")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_job_with_one_line(killed, models, tmp_path):
    process = launched(2, *command(models / "llama", tmp_path / "out", *LONG))
    ranks = workers(process, 2)
    rank = next(p for p in ranks if p.environ()["RANK"] == str(killed))
    until = time.monotonic() + 300
    while not (tmp_path / "out" / "model-rest.safetensors").exists():  # the first block is at work
        assert time.monotonic() < until, process.communicate()[1]
        time.sleep(0.1)
    rank.send_signal(signal.SIGKILL)
    _out, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(lines_of(errors)) == 1, errors
    assert "the same command resumes" in lines_of(errors)[0]
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
