"""A run that is killed at any of its writes and started again ends with the bytes of one that never stopped."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import lowbit
from lowbit.checkpoints.partial import final_name, is_partial
from lowbit.pipeline.end_to_end import Tuning
from lowbit.runs.folder import REST, RUN, TIMING
from lowbit.runs.manifest import MANIFEST
from tiny import save_tiny

pytestmark = pytest.mark.heavy  # makes whole runs by the dozen

# By name a scheme and a recipe file: rounding only, closed forms, learned maps with pictures, the whole model.
RECIPES = {
    "rtn": ("w4a16g16-sym", "steps: [rtn]"),
    "smoothquant+gptq": ("w4a8", "steps: [smoothquant, gptq]"),
    "affinequant": ("w4a16g16-sym", "steps: [affinequant: {epochs: 1}, rtn]"),
    "rounding": ("w4a16g16-sym", "steps: [rounding: {epochs: 1, start: gptq}]"),
    "tune": ("w4a16g16-sym", "steps: [gptq, tune: {epochs: 2, rank: 2, held_out: 0}]"),
}


class Killed(BaseException):
    """Passes every handler of errors, as a kill does."""


@dataclass(frozen=True)
class Whole:
    """A run that never stopped: its files, what each of its writes gave its name, relative to the folder."""

    start: Callable[[Path], lowbit.Quantized]
    files: dict[str, bytes]
    writes: list[str]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """All files but the timing, which says when a run was made."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != TIMING)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def inodes(folder: Path) -> dict[str, int]:
    """The shards that are there; one that is written again is another file."""
    return {path.name: path.stat().st_ino for path in [*folder.glob("block-*.safetensors"), *folder.glob(REST)]}


def half_written(file: Path) -> bool:
    """Whether the file lies there under its temporary name."""
    return any(final_name(path) == file.name for path in file.parent.iterdir() if is_partial(path))


def assert_same(folder: Path, whole: Whole) -> None:
    """Byte by byte, and nothing of ``.run`` and no half-written file is left."""
    found = folder_bytes(folder)
    assert set(found) == set(whole.files)
    assert [name for name in found if found[name] != whole.files[name]] == []
    assert not (folder / RUN).exists()


def watch(patch: pytest.MonkeyPatch, out: Path, seen: Callable[[str, bool], None]) -> None:
    """Call ``seen(name, renamed)`` around each rename that puts a file of ``out`` in its place."""
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        name = str(Path(target).relative_to(out)) if Path(target).is_relative_to(out) else ""
        if name:
            seen(name, False)
        real(source, target)
        if name:
            seen(name, True)

    patch.setattr(os, "replace", replace)


def kill_at(patch: pytest.MonkeyPatch, out: Path, write: int, renamed: bool) -> None:
    """Die at a write, counted from 1: with the file whole under its temporary name, or right after the rename."""
    count = itertools.count(1)

    def seen(name: str, done: bool) -> None:
        if done is renamed and next(count) == write:
            raise Killed

    watch(patch, out, seen)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "m"
    save_tiny(folder, "llama", num_hidden_layers=2)
    for name, (_, recipe) in RECIPES.items():
        (folder.parent / f"{name}.yaml").write_text(recipe)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path) -> Callable[[str], Whole]:
    """The run of a recipe that never stopped, made once."""
    made: dict[str, Whole] = {}

    def run(name: str) -> Whole:
        def start(out: Path) -> lowbit.Quantized:
            text, recipe = str(model / "calib.txt"), str(model.parent / f"{name}.yaml")
            sizes = {"data": text, "samples": 3, "length": 12}
            return lowbit.quantize(str(model), out, scheme=RECIPES[name][0], recipe=recipe, effort="paper", **sizes)

        if name not in made:
            out, writes = model.parent / name, []
            with pytest.MonkeyPatch.context() as patch:
                watch(patch, out, lambda file, renamed: None if renamed else writes.append(file))
                start(out)
            made[name] = Whole(start, folder_bytes(out), writes)
        return made[name]

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_every_file_of_a_run_gets_its_name_when_it_is_whole_and_the_manifest_is_the_last(name, whole):
    run = whole(name)
    assert {*run.files, TIMING} <= set(run.writes)
    assert run.writes[-1] == MANIFEST
    assert run.writes.count(MANIFEST) == 1
    layers = 2 if name != "tune" else 4
    assert sum(file.endswith(".json") and "block-" in file for file in run.writes) == layers


@pytest.mark.parametrize("renamed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_every_write_and_started_again_it_gives_the_same_bytes(name, renamed, whole, tmp_path, monkeypatch):
    run = whole(name)
    for write, file in enumerate(run.writes, 1):
        out = tmp_path / f"{write}"
        with monkeypatch.context() as patch:
            kill_at(patch, out, write, renamed)
            with pytest.raises(Killed):
                run.start(out)
        assert (out / file).exists() >= renamed
        assert half_written(out / file) is not renamed
        assert (out / MANIFEST).exists() is (renamed and file == MANIFEST)
        there = inodes(out)
        run.start(out)
        assert_same(out, run)
        assert inodes(out).items() >= there.items()  # what was there is not made again


def test_killed_again_and_again_a_run_still_gives_the_same_bytes(whole, tmp_path, monkeypatch):
    """The first start dies at its first write, the second at its second, until one has no more writes left."""
    run, out = whole("rtn"), tmp_path / "out"
    for deaths in itertools.count():
        with monkeypatch.context() as patch:
            kill_at(patch, out, deaths + 1, renamed=deaths % 2 == 1)
            try:
                run.start(out)
                break
            except Killed:
                assert not (out / MANIFEST).exists()
    assert deaths >= 8
    assert_same(out, run)


def test_killed_in_an_epoch_of_the_whole_model_it_gives_the_same_bytes(whole, tmp_path, monkeypatch):
    run, out = whole("tune"), tmp_path / "out"
    exact, calls, state = Tuning.loss, itertools.count(1), []

    def loss(self, chosen):
        # In the second of three steps of the first epoch; of the second, begun from the state that the first left.
        if next(calls) in (3, 9):
            state.append((out / RUN / "tune.safetensors").exists())
            raise Killed
        return exact(self, chosen)

    monkeypatch.setattr(Tuning, "loss", loss)
    for _ in range(2):
        with pytest.raises(Killed):
            run.start(out)
    assert state == [False, True]
    run.start(out)
    assert_same(out, run)


CHILD = """
import os, signal, sys
import torch
import lowbit


torch.set_num_threads(1)
model, out, scheme, recipe, write, renamed = sys.argv[1:]
real, count = os.replace, 0

def replace(source, target):
    global count
    count += str(target).startswith(out)
    dies = count == int(write) and str(target).startswith(out)
    if dies and not int(renamed):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
sizes = {"data": model + "/calib.txt", "samples": 3, "length": 12}
lowbit.quantize(model, out, scheme=scheme, recipe=recipe, effort="paper", **sizes)
"""


@pytest.mark.parametrize(
    ("name", "file", "renamed"),
    [
        ("smoothquant+gptq", "block-00001.safetensors", False),
        ("affinequant", ".run/block-00001.json", True),
        ("tune", ".run/tune.safetensors", True),
        ("smoothquant+gptq", MANIFEST, False),
    ],
)
def test_a_process_that_sigkill_ends_leaves_what_another_one_finishes(name, file, renamed, whole, model, tmp_path):
    run, out = whole(name), tmp_path / "out"
    write = run.writes.index(file) + 1
    given = [str(model), str(out), RECIPES[name][0], str(model.parent / f"{name}.yaml")]
    command = [sys.executable, "-c", CHILD, *given, str(write), str(int(renamed))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / RUN / "identity.json").exists()
    assert not (out / MANIFEST).exists()
    if file == "block-00001.safetensors":
        done = subprocess.run([*command[:-2], "0", "0"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        run.start(out)
    assert_same(out, run)


def test_a_finished_run_is_not_done_again(whole, tmp_path, monkeypatch):
    run = whole("rtn")
    first = run.start(tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    monkeypatch.setattr("lowbit.pipeline.runner.Walk.walk", lambda *a: pytest.fail("ran again"))
    again = run.start(tmp_path / "out")
    assert again.manifest == first.manifest
    assert folder_bytes(tmp_path / "out") == before
