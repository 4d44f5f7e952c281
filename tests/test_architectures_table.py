"""The table of architectures: a child process for each type, rows that are kept, a page that says what failed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from lowbit.models.architecture import DeclaredEdge, LayerKind

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import architectures

KINDS = [{"layers": 2, "linears": 7, "edges": ["norm 3"]}]
GOOD = {"ok": True, "seconds": 1.0, "kinds": KINDS, "refuted": [], "notes": []}


def broken(type: str) -> architectures.Row:
    raise ValueError(f"no {type}\nat all")


def killed(type: str) -> architectures.Row:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.parametrize(
    ("measure", "row"),
    [
        (lambda type: GOOD, GOOD),
        (broken, {"ok": False, "why": "no llama at all"}),
        (killed, {"ok": False, "why": "stopped by signal 9: longer than 45 s, or out of memory"}),
    ],
)
def test_a_child_ends_in_a_row(monkeypatch, measure, row):
    monkeypatch.setattr(architectures, "measure", measure)
    assert architectures.in_a_child("llama") == row


def test_a_run_goes_on_where_it_stopped(monkeypatch, tmp_path):
    asked: list[str] = []

    def child(type: str) -> architectures.Row:
        asked.append(type)
        if type == "opt" and len(asked) == 2:
            raise KeyboardInterrupt
        return GOOD

    monkeypatch.setattr(architectures, "in_a_child", child)
    file = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        architectures.run(["llama", "opt"], {}, file)
    architectures.run(["llama", "opt"], json.loads(file.read_text()), file)
    assert asked == ["llama", "opt", "opt"]
    assert list(json.loads(file.read_text())) == ["llama", "opt"]


def test_the_page_has_rows_reasons_and_what_is_missing():
    rows = {"llama": {**GOOD, "class": "LlamaForCausalLM"}, "opt": {"ok": False, "why": "a | b", "class": "X"}}
    text = architectures.page(rows)
    assert "1 of 2 are discovered and proven" in text
    assert "| `llama` | LlamaForCausalLM | 2 | norm 3 |" in text
    assert "| `opt` | X | a / b |" in text
    assert "goes on with" in text
    assert "`gpt2`" in text


def test_edges_in_short():
    edges = (
        DeclaredEdge("norm", "a", ("b", "c")),
        DeclaredEdge("channels", "b", ("d",), "positive", power=2),
        DeclaredEdge("channels", "c", ("d",), "positive", power=2),
        DeclaredEdge("qk", "b", ("c",), "matrix", pairs=((0, 1),), free=(2, 3)),
    )
    wanted = ["norm 2", "channels positive power 2 x 2", "qk matrix 1 pairs 2 free"]
    assert architectures.edges_of(LayerKind((), edges)) == wanted


def test_every_type_has_a_config():
    assert set(architectures.CLASSES) <= set(CONFIG_MAPPING)
    assert set(architectures.DECODER) <= set(architectures.CLASSES)
