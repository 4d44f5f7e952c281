"""llama.cpp computes every architecture of the table as transformers does, float and quantized."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
import torch

import gguf_models
import lowbit
from gguf_models import MODELS
from tiny import tiny_ids

pytest.importorskip("llama_cpp", reason="pip install 'lowbit[llamacpp]'")
from test_gguf_architectures import run_of
from test_llamacpp import through_the_table

from lowbit.exporters.llamacpp import open_session

# Float32's order of sums, in units of the logits' spread, and what is larger: linear attention is summed in chunks
# by one of the two, and an input of the table of GELU that is computed twice may be on both sides of a float16 step.
CLOSE = 2e-5
EXCEPT = {
    **dict.fromkeys(("qwen3.5", "qwen3.5-grouped", "qwen3.5-moe", "qwen3-next"), 1e-3),
    **dict.fromkeys(("gpt-neox", "starcoder2", "gemma4", "gemma4-large", "gemma4-moe"), 1e-3),
    "falcon-h1": 1e-4,
}
ALONE = range(3, 90, 11)  # tokens that are texts of their own

pytestmark = [pytest.mark.runtimes, pytest.mark.heavy]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixtures that no family declares are known."""
    gguf_models.declare(monkeypatch)


@pytest.mark.parametrize("case", MODELS)
def test_float_matrices_give_the_models_own_logits(tmp_path: Path, case: str) -> None:
    # FP8 with float32 scales: llama.cpp has no type for it, so the file's matrices are F32, whose inputs stay float.
    run = run_of(tmp_path, case, "fp8-tensora16:f32")
    file = lowbit.export(run, "gguf").out
    ids = tiny_ids(1, 48)
    with torch.no_grad(), open_session(file, 64, exact=True) as session:
        theirs, ours = session.logits(ids[0].tolist()), through_the_table(lowbit.load(run))(ids).logits[0]
    assert float((theirs - ours).abs().max()) < EXCEPT.get(case, CLOSE) * float(ours.std())
    assert float((theirs - ours)[0].abs().max()) < CLOSE * float(ours.std())


@pytest.mark.parametrize("case", MODELS)
def test_rounded_inputs_are_the_only_difference(tmp_path: Path, case: str) -> None:
    run = run_of(tmp_path, case)
    file = lowbit.export(run, "gguf").out
    plain = lowbit.load(run)
    model = through_the_table(lowbit.load(run, target="llama.cpp"))
    gaps, shares = list[float](), list[float]()
    with torch.no_grad(), open_session(file, 64, exact=True) as session:
        for token in ALONE:
            theirs, ours = session.logits([token]), model(torch.tensor([[token]])).logits[0]
            gaps.append(float((theirs - ours).abs().max() / ours.std()))
        for seed in range(5):
            ids = tiny_ids(1, 48, seed)
            theirs = session.logits(ids[0].tolist())
            left, all_of_it = (theirs - model(ids).logits[0]).abs(), (theirs - plain(ids).logits[0]).abs()
            shares.append(float(left.mean() / all_of_it.mean()))
    # Of eight tokens one may have a value on an edge between codes; of a text, all that follows sees such a one. No
    # bound on what rounding itself does: an expert chosen in place of another, or a state that lasts, makes it large.
    assert sum(gap > 1e-5 for gap in gaps) <= 1
    assert median(shares) < 0.2
