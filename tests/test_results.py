"""Results stay with the run that they are about, one for each protocol, and go with its weights."""

from __future__ import annotations

import json
import math

import pytest

import lowbit
from lowbit.checkpoints.identity import tokenizer_digest
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.evaluation.results import EVALUATIONS, entry, keep, kept, labels_of, results_of
from tiny import save_tiny


def one(value: float, length: int = 32, on: str = "a.txt") -> dict:
    return entry(on, "perplexity", value, {"length": length})


def test_equal_protocols_replace_others_stay(tmp_path):
    keep(tmp_path, "f", [one(9.0), one(8.0, 64)])
    keep(tmp_path, "f", [one(7.0), one(5.0, on="b.txt")])
    found = {(e["on"], e["protocol"]["length"]): e["value"] for e in kept(tmp_path, "f")}
    assert found == {("a.txt", 32): 7.0, ("a.txt", 64): 8.0, ("b.txt", 32): 5.0}


def test_results_of_other_weights_go(tmp_path):
    keep(tmp_path, "old", [one(9.0)])
    assert kept(tmp_path, "new") == []
    keep(tmp_path, "new", [one(8.0)])
    assert kept(tmp_path, "old") == []


def test_results_of_another_tokenizer_go(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    keep(tmp_path, "f", [one(9.0)])
    assert len(kept(tmp_path, "f")) == 1
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert kept(tmp_path, "f") == []


def test_names_of_files_are_as_long_as_tells_them_apart():
    names = ["/a/de/t.txt", "/a/en/t.txt", "t.txt", "/a/en/x/s.txt", "/b/en/x/s.txt", "./t.txt", "own"]
    found = labels_of(names)
    assert list(found.values()) == ["de/t.txt", "en/t.txt", "t.txt", "a/en/x/s.txt", "b/en/x/s.txt", "t.txt", "own"]


def no_constant(name: str):
    raise AssertionError(f"{name} is no JSON")


def test_what_is_not_finite_and_where_a_text_lay_are_not_written(tmp_path):
    (label,) = labels_of(["/home/me/a.txt"]).values()
    keep(tmp_path, "f", [entry(label, "perplexity", math.inf, {}, error=math.nan)])
    json.loads((tmp_path / EVALUATIONS).read_text(), parse_constant=no_constant)
    assert kept(tmp_path, "f")[0] == {
        "runtime": None,
        "on": "a.txt",
        "measure": "perplexity",
        "value": None,
        "error": None,
        "protocol": {},
    }


@pytest.mark.parametrize(
    "content",
    ["{", '{"format": 2}', '{"format": 1, "fingerprint": "f", "tokenizer": "TOKENIZER", "results": [{"on": 1}]}'],
)
def test_a_broken_file_is_one_line(content, tmp_path):
    (tmp_path / EVALUATIONS).write_text(content.replace("TOKENIZER", tokenizer_digest(tmp_path)))
    with pytest.raises(LowbitError, match=EVALUATIONS):
        kept(tmp_path, "f")


def test_evaluate_keeps_its_result_with_a_run_and_leaves_a_float_model_alone(tmp_path, capsys):
    save_tiny(tmp_path / "m", "llama")
    text = str(tmp_path / "m/calib.txt")
    lowbit.quantize(
        str(tmp_path / "m"), tmp_path / "run", scheme="w4a8", recipe="rtn", data=text, samples=2, length=16
    )
    for folder in ("m", "run"):
        assert (
            call(["evaluate", str(tmp_path / folder), "--data", text, "--length", "32", "--tokens", "64", "--json"])
            == 0
        )
        told = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "m" / EVALUATIONS).exists()
    (found,) = kept(tmp_path / "run", told["fingerprint"])
    assert (found["on"], found["value"]) == ("calib.txt", told["perplexity"][text])
    # The run is still the finished run that it was.
    assert (
        lowbit.quantize(
            str(tmp_path / "m"), tmp_path / "run", scheme="w4a8", recipe="rtn", data=text, samples=2, length=16
        ).seconds
        < 60
    )


def test_results_of_two_dtypes_stand_beside_each_other(tmp_path):
    """Float32 is not told, so that its results replace those of versions that did not tell it."""
    text = {"perplexity": {"a": 9.0}, "tokens": {"a": 64}, "data_hash": {"a": "0f"}, "length": 32, "bos": "auto"}
    row = {"metrics": {"acc": 0.5}, "errors": {"acc": 0.02}, "documents": 40, "version": 1.0, "data_hash": "1f"}
    settings = {"shots": 0, "special": "", "limit": None, "seed": 0, "lm_eval": "0.4", "target": None}
    for dtype, value in (("float32", 9.0), ("bfloat16", 9.5), ("float32", 9.25)):
        tasks = {"tasks": {"piqa": row}, "averages": {}, "protocol": settings | {"dtype": dtype}, "fingerprint": "f"}
        keep(tmp_path, *results_of(text | {"perplexity": {"a": value}, "dtype": dtype, "zero_shot": tasks}))
    found = [(e["on"], e["protocol"].get("dtype"), e["value"]) for e in kept(tmp_path, "f")]
    assert sorted(found, key=str) == [
        ("a", "bfloat16", 9.5),
        ("a", None, 9.25),
        ("piqa", "bfloat16", 50.0),
        ("piqa", None, 50.0),
    ]


def test_tasks_and_their_averages_are_entries_in_percent():
    row = {"metrics": {"acc": 0.5, "perplexity": 8.0}, "errors": {"acc": 0.02}, "documents": 40, "version": 1.0}
    tasks = {name: {**row, "data_hash": name} for name in ("piqa", "lambada_openai")}
    protocol = {
        "shots": 0,
        "special": "",
        "limit": 40,
        "seed": 3,
        "lm_eval": "0.4",
        "target": None,
        "dtype": "float32",
    }
    means = {"qllm": {"tasks": list(tasks), "acc": 0.5, "acc_norm": 0.25}}
    told = {"zero_shot": {"tasks": tasks, "averages": means, "protocol": protocol, "fingerprint": "f"}}
    whose, entries = results_of(told)
    assert whose == "f"
    found = {(one["on"], one["measure"]): one for one in entries}
    assert (found["piqa", "acc, %"]["value"], found["piqa", "acc, %"]["error"]) == (50.0, 2.0)
    assert found["piqa", "perplexity"]["value"] == 8.0
    assert found["piqa", "acc, %"]["protocol"]["limit"] == 40
    assert found["mean of 2 tasks (qllm)", "acc_norm, %"]["value"] == 25.0
    assert results_of(told | {"perplexity": {}})[1] == entries
