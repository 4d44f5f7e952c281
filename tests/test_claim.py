"""Processes that share a folder and nothing else: the bytes of one process, also where one of them dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import lowbit
from claim_worker import run
from lowbit.errors import LowbitError
from lowbit.pipeline import claim
from lowbit.pipeline.recipe import recipe_from_dict
from lowbit.pipeline.runner import Walk
from lowbit.runs import folder
from lowbit.runs.folder import CLAIMS, IDENTITY, PRESENT, RUN, claimed, join_folder
from lowbit.runs.manifest import Identity
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
    assert [path.name for path in (out / CLAIMS).glob("block-*")] == ["block-00000"]
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


def test_a_process_that_does_not_claim_is_refused_while_others_hold_no_block(model, tmp_path, monkeypatch):
    """In its pass through the float model a process that claims holds none; the other would write the same files."""
    out, said = tmp_path / "out", []

    def refused() -> None:
        with pytest.raises(LowbitError, match="is in use by process"):
            run(model, out, "awq", claim=False)
        with pytest.raises(LowbitError, match="is in use by process"), claimed(out, kept[0]):
            pass  # also where it has looked before the other one came

    kept: list[Identity] = []
    joining = folder.join_folder

    def join_folder(out, identity, *more):
        kept.append(identity)
        return joining(out, identity, *more)

    def float_pass(skeleton, ids, device):
        said.append([path.name for path in (out / CLAIMS).glob("block-*")])
        monkeypatch.setattr(claim, "embed_tokens", embed)
        refused()
        return embed(skeleton, ids, device)

    embed = claim.embed_tokens
    monkeypatch.setattr(claim, "join_folder", join_folder)
    monkeypatch.setattr(claim, "embed_tokens", float_pass)
    run(model, out, "awq", claim=True)
    assert said == [[]]
    monkeypatch.undo()
    run(model, tmp_path / "one", "awq", claim=False)
    assert folder_bytes(out) == folder_bytes(tmp_path / "one")
    assert not (out / RUN).exists()


def test_a_killed_process_leaves_the_folder_to_any_other(model, tmp_path):
    out, stuck = tmp_path / "out", tmp_path / "out.stuck"
    process, until = started(model, out, "rtn", "stuck"), time.monotonic() + 300
    while not stuck.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(list((out / CLAIMS).glob(f"{PRESENT}*"))) == 1
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with ExitStack() as stay:  # whoever joins next removes what the dead one has left
        identity = Identity(**json.loads((out / RUN / IDENTITY).read_text()))
        assert join_folder(out, identity, lambda: None, stay) == "running"
        assert len(list((out / CLAIMS).glob(f"{PRESENT}*"))) == 1
    assert not list((out / CLAIMS).glob(f"{PRESENT}*"))
    run(model, out, "rtn", claim=False)
    assert not (out / RUN).exists()
