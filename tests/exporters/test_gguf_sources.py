"""Files of further architectures are read as models that compute what the files do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from test_gguf_architectures import run_of
from transformers import AutoModelForCausalLM

import lowbit
from gguf_files import write
from lowbit.checkpoints.gguf_reader import convert
from lowbit.errors import LowbitError
from tiny import tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs

CASES = ["granite", "ministral3", "olmo2", "glm4", "cohere2", "stablelm", "smollm3", "phi4-mini"]


def read(file: Path) -> Any:
    folder = file.with_suffix("")
    folder.mkdir()
    convert(file, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("case", CASES)
def test_an_exported_run_is_read_back_with_its_logits(tmp_path: Path, case: str) -> None:
    # llama.cpp computes the same from these files: test_llamacpp_architectures.py.
    run = run_of(tmp_path, case)
    file = lowbit.export(run, "gguf").out
    ids = tiny_ids(1, 48)
    with torch.no_grad():
        ours, got = lowbit.load(run)(ids).logits, read(file.rename(tmp_path / "m.gguf"))(ids).logits
    assert float((got - ours).abs().max()) < 1e-5 * float(ours.std())


def changed(source: Path, target: Path, keys: dict[str, Any]) -> Path:
    """A file with other metadata (``None`` removes a key) and the same tensors, as floats."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    held = {f".{key}": field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    held.pop(".general.architecture")
    tensors = {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return write(target, arch, held | {f".{arch}.{key}": value for key, value in keys.items()}, tensors)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("granite", {"rope.scaling.finetuned": False}, "rope.scaling.finetuned = False"),
    ("granite", {"logit_scale": None}, "lacks the metadata key granite.logit_scale"),
    ("granite", {"residual_scale": -1.0}, "residual_scale = -1"),
    ("olmo2", {"attention.sliding_window": 8}, "olmo2.attention.sliding_window = 8"),
    ("glm4", {"rope.dimension_sections": [4, 2, 2, 0]}, "glm4.rope.dimension_sections"),
    ("cohere2", {"attention.sliding_window": None}, "lacks the metadata key cohere2.attention.sliding_window"),
    ("cohere2", {"rope.freq_base_swa": 500.0}, "cohere2.rope.freq_base_swa = 500"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual = True: the tensors of the first layer"),
    ("ministral3", {"attention.temperature_length": 64}, "mistral3.attention.temperature_length = 64"),
]


@pytest.mark.parametrize("case", sorted({case for case, _, _ in REFUSED}))
def test_what_the_class_cannot_express_is_refused_by_name(tmp_path: Path, case: str) -> None:
    file = lowbit.export(run_of(tmp_path, case), "gguf").out
    for i, (keys, message) in enumerate((keys, message) for name, keys, message in REFUSED if name == case):
        (folder := tmp_path / f"back-{i}").mkdir()
        with pytest.raises(LowbitError) as caught:
            convert(changed(file, tmp_path / f"{i}.gguf", keys), folder)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


HONOURED: list[tuple[str, dict[str, Any]]] = [
    ("granite", {"attention.scale": 0.5, "embedding_scale": 1.0, "residual_scale": 0.0, "logit_scale": 1.0}),
    ("ministral3", {"attention.temperature_scale": 0.0}),
    ("ministral3", {"rope.scaling.yarn_log_multiplier": 1.0}),
    ("cohere2", {"attention.sliding_window_pattern": 3}),
    ("glm4", {"rope.dimension_count": 16}),
]


@pytest.mark.parametrize(("case", "keys"), HONOURED)
def test_a_key_that_is_read_changes_the_logits_as_in_llamacpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, keys: dict[str, Any]
) -> None:
    pytest.importorskip("llama_cpp", reason="pip install 'lowbit[llamacpp]'")
    from lowbit.exporters.llamacpp import source_distance

    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    run = run_of(tmp_path, case)
    file = changed(lowbit.export(run, "gguf").out, tmp_path / "m.gguf", keys)
    ids = tiny_ids(1, 48)
    assert source_distance(file, ids[0].tolist()) < 1e-4
    with torch.no_grad():
        ours, got = lowbit.load(run)(ids).logits, read(file.rename(tmp_path / "n.gguf"))(ids).logits
    assert (got - ours).norm() > 1e-3 * ours.norm()
