"""Mutated models are refused in one line or read as transformers reads them; and the fuzz test sees it if not."""

from __future__ import annotations

import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from fuzz import Case, Fuzzer, Report, cases, settings, summary
from fuzzing.areas import AREAS
from fuzzing.bases import FOLDERS, GGUF, IDS, QUANTIZED, RUNS, theirs
from fuzzing.change import SAME, Anything, Expect, Patched, Refusal, Theirs
from fuzzing.gguf_bytes import Gguf
from fuzzing.guards import MIB, Hang, guarded, time_limit
from fuzzing.judge import Failure, Judge, distance
from fuzzing.safetensors_bytes import Shard
from lowbit.checkpoints.resolve import resolve
from lowbit.errors import LowbitError
from runs import streamed_logits

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory limit needs Linux"),
]
EACH = 20  # mutations of an area; `make fuzz` tries thousands


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    with settings():
        yield Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("area", AREAS)
def test_mutated_models_are_refused_in_one_line_or_read_rightly(area, fuzzer):
    reports = [report for case in cases(0, EACH, [area]) if (report := fuzzer.run(case)) is not None]
    assert not reports, "\n" + "\n".join(map(str, reports)) + "\n\n" + summary(reports)


@pytest.mark.parametrize("name", [*FOLDERS, *RUNS, *QUANTIZED, *GGUF])
def test_the_models_are_valid_before(name, fuzzer):
    """Else every refusal would prove nothing."""
    base = fuzzer.bases[name]
    evaluated = lowbit.evaluate(str(base.path), data=str(fuzzer.root / "text.txt"), length=12, tokens=24)
    assert set(evaluated.tokens.values()) == {24}
    logits = streamed_logits(resolve(str(base.path)).folder, IDS)
    assert distance(logits, theirs(base.folder)) < 1e-5
    assert logits.std() > 0.1


@pytest.mark.parametrize("area", AREAS)
def test_every_mutator_changes_its_models(area, fuzzer, tmp_path):
    for index, mutator in enumerate(AREAS[area].mutators):
        changed = False
        for name in AREAS[area].bases:
            for seed in range(6):
                work = tmp_path / f"{index}-{name}-{seed}"
                work.mkdir()
                path = fuzzer.bases[name].copy(work)
                assert mutator(path, random.Random(seed)).text.isprintable()
                changed |= contents(path) != contents(fuzzer.bases[name].path)
        assert changed, mutator


def contents(path: Path) -> dict[str, bytes | None]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in files}


def test_a_case_is_the_same_each_time(fuzzer, tmp_path):
    for area in AREAS:
        both = []
        for turn in "ab":
            (tmp_path / f"{area}{turn}").mkdir()
            model = fuzzer.mutate(Case(3, area, 5), tmp_path / f"{area}{turn}")
            both.append((model.text, contents(model.path)))
        assert both[0] == both[1]
        (tmp_path / f"{area}c").mkdir()
        other = fuzzer.mutate(Case(4, area, 5), tmp_path / f"{area}c")
        assert (other.text, contents(other.path)) != both[0]


def test_files_taken_apart_and_put_together_are_the_same(fuzzer, tmp_path):
    for name in GGUF:
        Gguf.read(fuzzer.bases[name].path).write(tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == fuzzer.bases[name].path.read_bytes()
    file = fuzzer.bases["llama"].path / "model.safetensors"
    Shard.read(file).write(tmp_path / "out")
    assert Shard.read(tmp_path / "out") == Shard.read(file)
    assert {name: stored.value().tolist() for name, stored in Shard.read(file).tensors.items()} == {
        name: value.tolist() for name, value in load_file(tmp_path / "out").items()
    }


def raising(error: BaseException):
    def fail(*args, **options):
        raise error

    return fail


def unchecked(message: str) -> LowbitError:
    """An error with a message that its class would have made printable."""
    error = LowbitError("")
    error.args = (message,)
    return error


def flooding(*args, **options):
    print("a line\n" * 50)
    raise LowbitError("refused")


def scaled(folder):
    """A reader whose numbers are off by a thousandth of a layer."""
    model = lowbit.runs.load.load(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.1
    return model


@pytest.mark.parametrize(
    ("reader", "kind"),
    [
        (scaled, "other numbers"),
        (raising(ValueError("x")), "traceback"),
        (raising(MemoryError()), "memory"),
        (raising(LowbitError("cannot allocate memory")), "memory"),
        (raising(unchecked("two\nlines")), "bad message"),
        (raising(LowbitError("")), "bad message"),
        (raising(LowbitError("x" * 501)), "bad message"),
        (raising(LowbitError("a Traceback")), "bad message"),
        (raising(unchecked("\x1b[31m")), "bad message"),
        (raising(Hang()), "hang"),
        (flooding, "flood"),
    ],
)
def test_the_judge_sees(reader, kind, fuzzer, tmp_path, monkeypatch):
    monkeypatch.setattr(lowbit, "load", reader)
    assert [failure.kind for failure in judged(fuzzer, tmp_path, Theirs())] == [kind]


def test_the_judge_sees_results_that_are_no_numbers(fuzzer, tmp_path, monkeypatch):
    results = SimpleNamespace(perplexity={"text": float("nan")})
    monkeypatch.setattr(lowbit, "evaluate", lambda model, **options: results)
    assert [failure.kind for failure in judged(fuzzer, tmp_path, Theirs())] == ["not a number"]


def judged(fuzzer: Fuzzer, work: Path, expect: Expect, name: str = "llama"):
    base = fuzzer.bases[name]
    judge = Judge(base, base.copy(work), fuzzer.root / "text.txt", expect, work)
    return [failure for failure in judge.failures(False, False) if failure.stage != "stream"]


def test_the_judge_sees_that_files_are_written(fuzzer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        lowbit, "load", lambda folder: (folder / "zz").write_text("x") and raising(LowbitError("x"))()
    )
    assert [failure.kind for failure in judged(fuzzer, tmp_path, Theirs())] == ["writes"]


@pytest.mark.parametrize(
    ("expect", "kinds"),
    [
        (SAME, []),
        (Theirs(), []),
        (Anything(), []),
        (Refusal(), ["refusal due"]),
        (Patched({"rms_norm_eps": 1e-6}), []),
        (Patched({"rms_norm_eps": 0.5}), ["other numbers"]),
        (Patched({"num_hidden_layers": "x"}), ["other numbers"]),
    ],
)
def test_the_judge_holds_to_what_is_expected(expect, kinds, fuzzer, tmp_path):
    assert [failure.kind for failure in judged(fuzzer, tmp_path, expect)] == kinds


def test_limits_hold():
    began = time.monotonic()
    with pytest.raises(Hang), time_limit(wall=0.2):
        time.sleep(20)
    with pytest.raises(Hang), time_limit(cpu=0.2):
        sum(i for i in range(10**9))
    assert time.monotonic() - began < 20
    with time_limit(cpu=0.2):
        time.sleep(0.5)
    assert isinstance(guarded(lambda: bytearray(64 << 30))[1], MemoryError)
    taken = guarded(lambda: len(bytes([1]) * (600 * MIB)))[3]
    assert taken > 300 * MIB
    assert guarded(lambda: [print("x") for _ in range(7)])[2].lines == 7
    assert guarded(lambda: torch.ones(3).sum())[:2] == (torch.tensor(3.0), None)


def test_failures_are_grouped_with_the_worst_first():
    bad, hang = Failure("bad message", "load", "x"), Failure("hang", "load", "x", "a.py:1 f")
    reports = [Report(Case(0, "json", n), "zz", found) for n, found in enumerate([(bad,), (bad, hang), (bad,)])]
    assert summary(reports).splitlines() == [
        "1 x hang: x at a.py:1 f; json:1 zz",
        "2 x bad message: x (json, load); json:0 zz",
    ]
    assert str(reports[1]).splitlines()[1:] == ["    bad message in load: x", "    hang in load: x at a.py:1 f"]
