"""The table of architectures: models the whole way, each type in a child process, rows that are kept, a page."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn
from transformers import CONFIG_MAPPING

from lowbit.errors import LowbitError
from lowbit.models.architecture import Architecture, DeclaredEdge, LayerKind
from lowbit.quant.activations import IntTokens
from lowbit.quant.floating import NVFP4
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme import ModelFormats, ModuleFormats
from lowbit.runs.stock import dense_where_needed, why_not_stock

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import architectures
import architectures_edges
import architectures_page
import architectures_steps
from tiny import tiny_model

KINDS = [{"layers": 2, "linears": 7, "edges": ["norm 3"]}]
WAY = {"run": "ok", "stock": "equal"}
STEPS = {"rtn": WAY, "gptq": WAY, "affinequant": WAY}
FOUND = {"ok": True, "seconds": 1.0, "kinds": KINDS, "refuted": [], "notes": []}
GOOD = {**FOUND, "steps": STEPS}
STOPPED = "stopped by signal 9: out of memory, or longer than 3600 s"
FAST = ("olmo2", "stablelm")
SAMPLE = ("bloom", "cohere2", "gemma2", "glm4", "granite", "lfm2", "llama", "phi", "qwen3", "starcoder2")


# With these the sample has twelve; olmo2 has norms behind its layers only, stablelm rotates a part of each head.
@pytest.mark.parametrize("type", FAST)
def test_a_model_goes_the_whole_way(type):
    assert architectures.in_a_child(type)["steps"] == STEPS


@pytest.mark.heavy
@pytest.mark.parametrize("type", SAMPLE)
def test_models_of_the_sample_go_the_whole_way(type):
    row = architectures.in_a_child(type)
    assert architectures_steps.went(row, "rtn", "gptq"), row
    assert architectures_steps.went(row, "affinequant"), row


# Classes that need dense weights: to multiply with (Falcon), and to draw initial values into.
@pytest.mark.heavy
@pytest.mark.parametrize("type", ["falcon", "modernbert-decoder", "recurrent_gemma", "rwkv"])
def test_models_that_need_dense_weights_go_the_whole_way(type):
    row = architectures.in_a_child(type)
    assert architectures_steps.went(row, "rtn", "gptq", "affinequant"), row


@pytest.mark.heavy
def test_a_mixture_of_experts_goes_the_whole_way():
    row = architectures.in_a_child("olmoe")
    assert architectures_steps.went(row, "rtn", "gptq"), row
    assert architectures_steps.went(row, "affinequant"), row


class OwnLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


SYMMETRIC, ASYMMETRIC = IntFormat(4, 16), IntFormat(4, 16, symmetric=False)
WHY = "m.0.a multiplies with its weight in code of its own, which packed linears do not have, and weights that are "


@pytest.mark.parametrize(
    ("linear", "formats", "dense", "why"),
    [
        (nn.Linear, [ModuleFormats(SYMMETRIC)], False, None),
        (OwnLinear, [ModuleFormats(SYMMETRIC)], True, None),
        (OwnLinear, [ModuleFormats(ASYMMETRIC)], True, None),
        (OwnLinear, [ModuleFormats(NVFP4)], True, None),
        (
            OwnLinear,
            [ModuleFormats(SYMMETRIC, IntTokens(8, symmetric=False))],
            False,
            WHY + "made dense at load time have float inputs",
        ),
        (
            OwnLinear,
            [ModuleFormats(SYMMETRIC), ModuleFormats(ASYMMETRIC)],
            False,
            WHY + "made dense at load time are read in one format",
        ),
    ],
)
def test_the_plan_says_which_linears_stock_transformers_makes_dense_and_cannot_run(linear, formats, dense, why):
    layer = nn.ModuleDict({name: linear(16, 16) for name, _ in zip("ab", formats, strict=False)})
    architecture = Architecture("x", "m", "head", "embed", (LayerKind((tuple(layer),), ()),))
    skeleton = SimpleNamespace(model=tiny_model("llama"), layers=[layer], architecture=architecture)
    given = ModelFormats({f"m.0.{name}": own for name, own in zip(layer, formats, strict=True)})
    planned = dense_where_needed(skeleton, given)
    assert planned.dense is dense
    assert why_not_stock(skeleton, planned) == why


def good(type, folder):
    yield FOUND
    yield GOOD


def broken(type, folder):
    raise ValueError(f"no {type}\nat all")
    yield


def killed(type, folder):
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def killed_in_a_step(type, folder):
    yield FOUND
    yield FOUND | {"steps": {"rtn": WAY}}
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("measure", "row"),
    [
        (good, GOOD),
        (broken, {"ok": False, "why": "no llama at all"}),
        (killed, {"ok": False, "why": STOPPED}),
        (
            killed_in_a_step,
            FOUND | {"steps": {"rtn": WAY, "gptq": {"run": STOPPED}, "affinequant": {"run": STOPPED}}},
        ),
    ],
)
def test_a_child_ends_in_a_row(monkeypatch, measure, row):
    monkeypatch.setattr(architectures, "measure", measure)
    assert architectures.in_a_child("llama") == row


def test_a_step_that_fails_hides_no_other(monkeypatch, tmp_path):
    edgeless = SimpleNamespace(layers=[LayerKind((("a",),), ())])
    monkeypatch.setattr(architectures_steps, "prepared", lambda config, folder: ("w4a16", edgeless))
    monkeypatch.setattr(architectures_steps.lowbit, "quantize", spin)
    rows = list(architectures_steps.whole_way(None, tmp_path, lambda: architectures.limited(0.05)))
    assert [list(row) for row in rows] == [["rtn"], ["rtn", "gptq"], ["rtn", "gptq", "affinequant"]]
    assert rows[-1] == {
        "rtn": {"run": "stopped: longer than 0.05 s"},
        "gptq": {"run": "not this one"},
        "affinequant": {"run": "no edges"},
    }


def spin(model, out, *, recipe, **options):
    """Takes for ever with ``rtn``, and refuses any other recipe."""
    while recipe == "rtn":
        pass
    raise LowbitError("not this one")


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


def test_rows_of_other_sources_are_made_again(monkeypatch):
    monkeypatch.setattr(architectures, "made_by", lambda: "new")
    found = {
        "llama": GOOD | {"made_by": "new"},
        "opt": GOOD | {"made_by": "old"},
        "phi": FOUND | {"made_by": "new"},
        "mpt": GOOD | {"made_by": "old"},
        "gone": GOOD | {"made_by": "new"},
    }
    asked = ["llama", "opt", "phi"]
    assert list(architectures.kept_of(found, asked, None)) == ["llama", "phi", "mpt"]
    assert list(architectures.kept_of(found, asked, "failed")) == ["llama", "mpt"]
    assert list(architectures.kept_of(found, asked, "all")) == ["mpt"]


def test_the_page_has_rows_counts_reasons_and_what_is_missing():
    apart = {"run": "ok", "stock": "logits differ"}
    rows = {
        "llama": {**GOOD, "class": "LlamaForCausalLM"},
        "bloom": {**GOOD, "class": "B", "steps": {**STEPS, "gptq": apart, "affinequant": {"run": "x | y"}}},
        "mpt": {**GOOD, "class": "M", "kinds": [{**KINDS[0], "edges": []}], "steps": {}},
        "opt": {"ok": False, "why": "a | b", "class": "X"},
    }
    text = architectures.page(rows)
    assert "* 3 of 4 are discovered and proven; 1 of them have no edge." in text
    assert "* 2 are quantized by `rtn` and by `gptq`; 1 go the whole way with both." in text
    assert "* 1 are quantized by `affinequant`; 1 go the whole way with it." in text
    assert "| `llama` | LlamaForCausalLM | 2 | norm -> 3 linears | ok | ok | ok | equal |" in text
    assert "| `bloom` | B | 2 | norm -> 3 linears | ok | ok | no | no |" in text
    assert "| `mpt` | M | 2 | none |  |  |  |  |" in text
    assert "| `bloom` | stock after gptq | logits differ |" in text
    assert "| `bloom` | affinequant | x / y |" in text
    assert "| `opt` | X | a / b |" in text
    assert "| `reformer` | `is_decoder=True`, `axial_pos_embds=False` |" in text
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
    assert architectures_page.edges_of(LayerKind((), edges)) == wanted


@pytest.mark.parametrize(
    ("edges", "experts", "wanted"),
    [
        (["norm 2", "norm 1 x 2"], 8, "norm -> 2 linears; 2 x norm -> 1 linear"),
        ([], 8, "none"),
        (["norm 257", "heads matrix"], 128, "norm -> 1 linear and 2 of each expert; v -> o (matrix)"),
        (
            ["norm 130", "channels positive power 2 x 129"],  # of experts without a gate, beside a shared one
            128,
            "norm -> 2 linears and 1 of each expert; channels (positive, power 2); "
            "per expert: up -> down (positive, power 2)",
        ),
        (["channels diagonal x 9"], 0, "9 x channels (diagonal)"),
    ],
)
def test_edges_in_words(edges, experts, wanted):
    assert architectures_edges.sentence(edges, experts) == wanted


def test_experts_of_a_type():
    assert architectures_edges.experts_in(architectures.configured("qwen3_moe")) == 128
    assert architectures_edges.experts_in(architectures.configured("llama")) == 0


def test_the_page_is_written_anew_from_rows_alone(monkeypatch, tmp_path):
    def never(type: str) -> architectures.Row:
        raise AssertionError(type)

    monkeypatch.setattr(architectures, "in_a_child", never)
    rows = {"mixtral": {**GOOD, "class": "M", "kinds": [{**KINDS[0], "edges": ["norm 17", "channels diagonal x 8"]}]}}
    rows["mixtral"]["made_by"] = "old"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--no-runs", "--rows", str(tmp_path / "rows.json"), "--page", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", ["architectures.py", *options])
    monkeypatch.setattr(architectures.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(architectures.logging, "disable", lambda level: None)
    architectures.main()
    wanted = "norm -> 1 linear and 2 of each expert; per expert: up -> down (diagonal)"
    assert wanted in (tmp_path / "page.md").read_text()
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_every_type_has_a_config():
    assert set(architectures.CLASSES) <= set(CONFIG_MAPPING)
    assert set(architectures.DECODER) <= set(architectures.CLASSES)
