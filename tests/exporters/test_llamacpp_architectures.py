"""llama.cpp computes every architecture of the table as transformers does, float and quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gguf_models
import lowbit
from gguf_models import MODELS
from tiny import tiny_ids

pytest.importorskip("llama_cpp", reason="pip install 'lowbit[llamacpp]'")
from test_gguf_architectures import run_of
from test_llamacpp import logits, through_the_table

from lowbit.exporters.llamacpp import open_session

# Float32's order of sums, in units of the logits' spread, and what is larger: linear attention is summed in chunks
# by one of the two, and an input of the table of GELU that is computed twice may be on both sides of a float16 step.
CLOSE = 2e-5
EXCEPT = {"qwen3.5": 5e-4, "qwen3.5-grouped": 5e-4, "gpt-neox": 1e-3, "starcoder2": 1e-3}
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
    theirs, plain, rounding = logits(run, file)
    model = through_the_table(lowbit.load(run, target="llama.cpp"))
    with torch.no_grad(), open_session(file, 8, exact=True) as session:
        gaps = [(session.logits([t]) - model(torch.tensor([[t]])).logits[0]).abs().max() for t in ALONE]
    # Of one token, a value that stands on an edge between codes; in a text, what later tokens see of such ones. No
    # bound on what rounding itself does: an expert chosen in place of another, or a state that lasts, makes it large.
    assert sum(float(gap) > 1e-5 * float(plain.std()) for gap in gaps) <= 1
    # Steps of GELU's table are wider than those of float32, and move more inputs over an edge.
    most = 0.5 if case == "starcoder2" else 0.2
    assert float((theirs - rounding).abs().mean()) < most * float((theirs - plain).abs().mean())
