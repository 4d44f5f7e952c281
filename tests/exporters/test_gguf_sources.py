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

import gguf_models
import lowbit
from gguf_files import write
from lowbit.checkpoints.gguf_reader import convert
from lowbit.errors import LowbitError
from lowbit.exporters.run import open_run
from tiny import tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs

MIXTURES = ["qwen2-moe", "qwen3-moe", "olmoe"]
CASES = [
    "granite",
    "ministral3",
    "olmo2",
    "glm4",
    "cohere2",
    "stablelm",
    "smollm3",
    "phi4-mini",
    "lfm2",
    "gpt-neox",
    *MIXTURES,
]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixtures that no family declares are known."""
    gguf_models.declare(monkeypatch)


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


@pytest.mark.parametrize("scheme", ["w4a16g32-sym", "nvfp4a16"])
def test_codes_of_each_expert_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    run = run_of(tmp_path, "qwen3-moe", scheme, {"moe_intermediate_size": 64})
    file = lowbit.export(run, "gguf").out
    kept = lowbit.quantize(str(file), tmp_path / "kept", keep=True).out
    ours, theirs = open_run(run), open_run(kept)
    assert theirs.quantized == ours.quantized
    for module in ours.quantized:
        own, other = ours.qtensor(module), theirs.qtensor(module)
        assert other.format == own.format
        assert torch.equal(other.dequantize(), own.dequantize())


@pytest.mark.parametrize("name", ["blk.0.ffn_up_exps.weight", "blk.1.ffn_gate_inp.weight"])
def test_a_mixture_that_lacks_a_tensor_is_one_line(tmp_path: Path, name: str) -> None:
    file = lowbit.export(run_of(tmp_path, "qwen3-moe"), "gguf").out
    held = gguf.GGUFReader(file)
    keys = {f".{k}": f.contents() for k, f in held.fields.items() if not k.startswith(("GGUF.", "general.arch"))}
    tensors = {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in held.tensors}
    (tmp_path / "out").mkdir()
    cut = write(tmp_path / "cut.gguf", "qwen3moe", keys, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(LowbitError, match=r"lacks \d+ of the tensors that its metadata implies") as caught:
        convert(cut, tmp_path / "out")
    assert "\n" not in str(caught.value)
    few = tensors["blk.0.ffn_up_exps.weight"][:3]
    (tmp_path / "few").mkdir()
    short = write(tmp_path / "short.gguf", "qwen3moe", keys, tensors | {"blk.0.ffn_up_exps.weight": few})
    with pytest.raises(LowbitError, match=r"lacks 1 of the tensors .*experts\.3\.up_proj"):
        convert(short, tmp_path / "few")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("granite", {"rope.scaling.finetuned": False}, "rope.scaling.finetuned = False"),
    ("granite", {"logit_scale": None}, "lacks the metadata key granite.logit_scale"),
    ("granite", {"residual_scale": -1.0}, "residual_scale = -1"),
    ("olmo2", {"attention.sliding_window": 8}, "olmo2.attention.sliding_window = 8"),
    ("glm4", {"rope.dimension_sections": [4, 2, 2, 0]}, "glm4.rope.dimension_sections"),
    ("cohere2", {"attention.sliding_window": None}, "lacks the metadata key cohere2.attention.sliding_window"),
    ("cohere2", {"rope.freq_base_swa": 500.0}, "cohere2.rope.freq_base_swa = 500"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual = True: the tensors of the first layer"),
    ("lfm2", {"attention.head_count_kv": [0, 2, 1]}, "lfm2.attention.head_count_kv = [0, 2, 1]: allowed is 0"),
    ("lfm2", {"attention.head_count_kv": 2}, "lfm2.attention.head_count_kv = 2: allowed is an array of 3"),
    ("lfm2", {"shortconv.l_cache": None}, "lacks the metadata key lfm2.shortconv.l_cache"),
    ("gpt-neox", {"use_parallel_residual": None}, "lacks the metadata key gptneox.use_parallel_residual"),
    ("qwen3-moe", {"expert_used_count": 5}, "qwen3moe.expert_used_count = 5: the file has 4 experts"),
    ("qwen3-moe", {"expert_count": 3}, "which transformers' Qwen3MoeForCausalLM has no place for"),
    ("qwen3-moe", {"expert_weights_scale": 2.0}, "qwen3moe.expert_weights_scale = 2"),
    ("qwen3-moe", {"leading_dense_block_count": 1}, "qwen3moe.leading_dense_block_count = 1"),
    ("olmoe", {"attention.clamp_kqv": 8.0}, "olmoe.attention.clamp_kqv = 8"),
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
    ("qwen3-moe", {"expert_used_count": 1}),
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
