"""Locks and half-written files: one owner at a time, and nothing left behind by the dead stands in the way."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import lowbit
from lowbit.checkpoints import lock
from lowbit.checkpoints.lock import STALE, Locked, Owner, hold, holder, this_process
from lowbit.checkpoints.partial import final_name, is_left_over, is_partial, partial_of, sweep
from lowbit.errors import LowbitError
from lowbit.evaluation.results import entry, keep, kept
from lowbit.runs.folder import LOCK, RUN
from lowbit.runs.manifest import MANIFEST
from tiny import save_tiny

HOLD = """
import sys, time
from pathlib import Path
from lowbit.checkpoints.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def dead_pid() -> int:
    """The id of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def write_owner(path: Path, owner: Owner, age: float = 0.0) -> None:
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def elsewhere() -> Owner:
    return replace(this_process(), host="another-machine", boot="another-boot", pid=17)


def test_one_at_a_time_and_free_afterwards(tmp_path):
    with hold(tmp_path / "lock"):
        assert holder(tmp_path / "lock") == this_process()
        with pytest.raises(Locked) as caught, hold(tmp_path / "lock"):
            pass
        assert caught.value.owner == this_process()
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), hold(tmp_path / "lock"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_it_waits_as_long_as_it_was_told(tmp_path):
    began = time.monotonic()
    with hold(tmp_path / "lock"), pytest.raises(Locked), hold(tmp_path / "lock", wait=0.3):
        pass
    assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.parametrize("system_locks", [True, False])
def test_who_counts_as_alive(tmp_path, elsewhere, system_locks, monkeypatch):
    """The file alone is left of each owner, as of a killed one; only another machine may still be at work."""
    here, path = this_process(), tmp_path / "lock"
    if not system_locks:
        monkeypatch.setattr(lock, "_lock", lambda descriptor: None)
    gone = [
        replace(here, pid=dead_pid()),
        replace(here, started=here.started - 1000),  # its number was given to another process
        replace(here, boot="before the machine restarted"),
    ]
    for owner in gone:
        write_owner(path, owner)
        assert holder(path) is None
        with hold(path):
            assert holder(path) == here
    write_owner(path, elsewhere)
    with pytest.raises(Locked, match="process 17 on another-machine"), hold(path):
        pass
    write_owner(path, elsewhere, age=STALE + 1)
    with hold(path):
        assert holder(path) == here


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff"])
def test_a_file_that_names_nobody_is_no_lock(tmp_path, broken):
    (tmp_path / "lock").write_bytes(broken)
    assert holder(tmp_path / "lock") is None
    with hold(tmp_path / "lock"):
        pass


def test_a_living_process_without_system_locks_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_lock", lambda descriptor: None)
    with hold(tmp_path / "lock"), pytest.raises(Locked), hold(tmp_path / "lock"):
        pass


def test_signs_of_life_go_on_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with hold(tmp_path / "lock"):
        os.utime(tmp_path / "lock", (0, 0))
        time.sleep(0.3)
        assert time.time() - (tmp_path / "lock").stat().st_mtime < 10


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_from_a_held_lock(tmp_path, number, monkeypatch):
    import fcntl

    def flock(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path / "lock"), pytest.raises(Locked), hold(tmp_path / "lock"):
        pass


@pytest.mark.heavy
def test_a_killed_process_holds_nothing(tmp_path):
    path = tmp_path / "lock"
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(Locked, match=f"process {child.pid} on "), hold(path):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert path.exists()
    with hold(path):
        assert holder(path) == this_process()


def count_up(path: Path, start) -> None:
    """Many read-modify-writes of a number, each under the lock."""
    start.wait()
    for _ in range(30):
        with hold(path.with_suffix(".lock"), wait=60):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))


def add_results(folder: Path, who: int, start) -> None:
    start.wait()
    for i in range(10):
        keep(folder, "f", [entry(f"{who}-{i}", "perplexity", 1.0, {})])


@pytest.mark.heavy
def test_processes_take_turns(tmp_path):
    (tmp_path / "n").write_text("0")
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    jobs = [context.Process(target=count_up, args=(tmp_path / "n", start)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert (tmp_path / "n").read_text() == "90"


@pytest.mark.heavy
def test_results_of_two_evaluations_at_once_are_all_kept(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    jobs = [context.Process(target=add_results, args=(tmp_path, who, start)) for who in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(kept(tmp_path, "f")) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["lowbit-evaluations.json"]


def test_partial_names_are_of_one_process_and_one_write(tmp_path):
    first, second = partial_of(tmp_path / "a.json"), partial_of(tmp_path / "a.json")
    assert first != second
    assert {first.parent, second.parent} == {tmp_path}
    assert final_name(first) == "a.json"
    assert is_partial(first)
    assert not is_left_over(first)
    long = partial_of(tmp_path / ("x" * 250))
    assert len(long.name) < 255


def test_sweeping_takes_what_dead_processes_left_and_nothing_else(tmp_path):
    mine = partial_of(tmp_path / "a.json")
    host = mine.name.split(".")[2].split("-")[0]
    dead = tmp_path / f"a.json.{host}-{dead_pid()}-00000000.partial"
    dead_folder = tmp_path / f"out.{host}-{dead_pid()}-00000001.partial"
    other = "0" * 6 if host != "0" * 6 else "1" * 6
    young, old = (tmp_path / f"a.json.{other}-1-0000000{i}.partial" for i in range(2))
    foreign, final = tmp_path / "film.partial", tmp_path / "a.json"
    for path in (mine, dead, young, old, foreign, final):
        path.write_text("x")
    dead_folder.mkdir()
    (dead_folder / "x").write_text("x")
    os.utime(old, (0, 0))
    os.utime(foreign, (0, 0))
    sweep(tmp_path, "out")
    assert not dead_folder.exists()
    assert dead.exists()
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, young, foreign, final}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("locked") / "m"
    save_tiny(folder, "llama", num_hidden_layers=2)
    return folder


def start(model: Path, out: Path, **more) -> lowbit.Quantized:
    sizes = {"data": str(model / "calib.txt"), "samples": 2, "length": 8}
    return lowbit.quantize(str(model), out, **{"scheme": "w4a16g16-sym", "recipe": "rtn", **sizes, **more})


def test_a_folder_in_use_is_refused_in_one_line_that_names_its_owner(model, tmp_path):
    out = tmp_path / "out"
    (out / RUN).mkdir(parents=True)
    with hold(out / RUN / LOCK), pytest.raises(LowbitError) as caught:
        start(model, out)
    here = this_process()
    assert f"--out {out} is in use by process {here.pid} on {here.host} (since 20" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert start(model, out).manifest.files


def test_a_second_run_while_the_first_is_at_work_is_refused_and_changes_nothing(model, tmp_path, monkeypatch):
    """The second is started from inside the first, where half of its shards are written."""
    from lowbit.pipeline.runner import Walk

    real, refused = Walk.write, []

    def write(self, block, *given):
        if block.start == 1:
            with pytest.raises(LowbitError, match="is in use by process") as caught:
                start(model, tmp_path / "out")
            refused.append(str(caught.value))
        real(self, block, *given)

    monkeypatch.setattr(Walk, "write", write)
    start(model, tmp_path / "out")
    assert len(refused) == 1
    assert start(model, tmp_path / "out").manifest.blocks


def test_foreign_files_never_enter_a_run_or_spoil_it(model, tmp_path, monkeypatch):
    from lowbit.pipeline.runner import Walk

    out, real = tmp_path / "out", Walk.write
    names = [".DS_Store", "block-00001.safetensors.partial", "README.md~", ".~lock.config.json#", "x.tmp"]

    def write(self, block, *given):
        for name in names:
            (out / name).write_text("x")
        real(self, block, *given)

    monkeypatch.setattr(Walk, "write", write)
    made = start(model, out)
    assert not set(names) & set(made.manifest.files)
    assert {path.name for path in out.iterdir()} == {*made.manifest.files, *names, MANIFEST, "lowbit-timing.json"}
    for name in names:
        (out / name).unlink()
    assert start(model, out).manifest == made.manifest


def test_a_folder_with_a_file_managers_litter_is_empty(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_text("x")
    assert ".DS_Store" not in start(model, tmp_path / "out").manifest.files
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("x")
    with pytest.raises(LowbitError, match="is not a lowbit run"):
        start(model, tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["notes.txt"]


def test_a_run_refused_before_its_first_file_leaves_no_folder(model, tmp_path, monkeypatch):
    def full(out, needed):
        raise LowbitError("out of disk")

    monkeypatch.setattr("lowbit.pipeline.quantize.check_space", full)
    with pytest.raises(LowbitError, match="out of disk"):
        start(model, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


TWO = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import lowbit
torch.set_num_threads(1)
model, out, to = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
sizes = {"data": model + "/calib.txt", "samples": 2, "length": 8}
try:
    if to:
        lowbit.export(out, to)
    else:
        lowbit.quantize(model, out, scheme="w4a16g16-sym", recipe="gptq", **sizes)
    print("done")
except lowbit.LowbitError as error:
    print(error)
"""


def two_at_once(model: Path, out: Path, to: str = "") -> list[str]:
    """What two processes say that get the starting signal at the same time."""
    command = [sys.executable, "-c", TWO, str(model), str(out), to]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    ended = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], ended
    return [out.strip() for out, _ in ended]


@pytest.mark.heavy
def test_two_processes_started_at_once_give_one_good_folder_and_one_good_export(model, tmp_path):
    whole = start(model, tmp_path / "whole", recipe="gptq")
    said = two_at_once(model, tmp_path / "out")
    assert "done" in said
    assert all(line == "done" or "is in use by process" in line for line in said)
    again = start(model, tmp_path / "out", recipe="gptq")
    assert again.manifest.files == whole.manifest.files
    assert not (tmp_path / "out" / RUN).exists()
    said = two_at_once(model, tmp_path / "out", "gptq")
    assert "done" in said
    assert all(line == "done" or "exists" in line for line in said)
    assert lowbit.verify(tmp_path / "out", [tmp_path / "out-gptq"], logits=False)[0].ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-gptq", "whole"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no zombies")
def test_a_process_that_was_killed_and_not_waited_for_is_no_owner(tmp_path):
    import psutil

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = psutil.Process(process.pid).create_time()
    owner = replace(this_process(), pid=process.pid, started=started)
    (tmp_path / "lock").write_text(json.dumps(asdict(owner)))
    assert holder(tmp_path / "lock") == owner
    process.kill()
    until = time.monotonic() + 60
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert holder(tmp_path / "lock") is None
    process.wait()
