"""The text model of a model that also sees is a ``.gguf`` file by itself, and computes what it does in its place."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForImageTextToText, AyaVisionConfig

import lowbit
import wrapped
from gguf_text_models import CONFIGS, saved
from lowbit.errors import LowbitError
from lowbit.exporters.gguf_architectures.text_models import CHECKED, text_model
from lowbit.exporters.gguf_model import architecture, unlike_llamacpp
from tiny import tiny_ids

DOCS = Path(__file__).parents[2] / "docs"
STAYS = "the file has the text model of a {} alone: its other parts stay behind"
# As in test_llamacpp_architectures: the order of float32's sums, and what a table of GELU adds.
CLOSE, GELU, LINEAR = 2e-5, 1e-3, 1e-3
EXCEPT = {"gemma3": GELU, "gemma4": GELU, "qwen3.5": LINEAR, "qwen3.5-moe": LINEAR}


def run_of(folder: Path, case: str, scheme: str) -> Path:
    model = saved(folder / "model", case)
    text = str(model / "calib.txt")
    return lowbit.quantize(
        str(model), folder / "run", scheme=scheme, recipe="rtn", data=text, samples=1, length=16
    ).out


def test_a_file_has_the_text_model_and_says_what_stays_behind(tmp_path: Path) -> None:
    run = run_of(tmp_path, "qwen3-vl", "w4a16g32-sym")
    made = lowbit.export(run, "gguf")
    assert made.warnings == [STAYS.format("Qwen3VLForConditionalGeneration")]
    (found,) = lowbit.verify(run, [made.out], logits=False)
    assert found.ok
    reader = gguf.GGUFReader(made.out)
    assert reader.fields["general.architecture"].contents() == "qwen3"
    names = {tensor.name for tensor in reader.tensors}
    assert {"token_embd.weight", "output_norm.weight", "output.weight", "blk.2.attn_q.weight"} <= names
    assert not [name for name in names if "vis" in name or name.startswith(("v.", "mm."))]


def test_a_wrong_byte_is_named_as_the_model_names_it(tmp_path: Path) -> None:
    run = run_of(tmp_path, "qwen3-vl", "w4a16g32-sym")
    file = lowbit.export(run, "gguf").out
    (tensor,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
    content = bytearray(file.read_bytes())
    content[int(tensor.data_offset) + 7] ^= 0x10
    file.write_bytes(content)
    (found,) = lowbit.verify(run, [file], logits=False)
    assert found.differs == ["model.language_model.layers.1.mlp.up_proj.weight"]


def test_a_class_that_was_not_compared_is_refused_by_name() -> None:
    config = AyaVisionConfig(architectures=["AyaVisionForConditionalGeneration"])
    assert text_model(config) is config
    said = unlike_llamacpp(text_model(config))
    assert said is not None
    assert said.startswith("AyaVisionForConditionalGeneration is not supported; known: LlamaForCausalLM, ")
    assert "Qwen3VLForConditionalGeneration" in said


def test_what_the_graph_does_not_compute_is_refused_of_a_text_model_too(tmp_path: Path) -> None:
    wrapped.save_wrapped(tmp_path / "model", "gemma3")  # whose second of three layers has full attention
    with pytest.raises(LowbitError, match="one in 6 has full attention"):
        lowbit.quantize(str(tmp_path / "model"), tmp_path / "run", scheme="w4a16g32-sym", target="llama.cpp")


@pytest.mark.parametrize("case", CONFIGS)
def test_every_case_has_a_row(case: str) -> None:
    name, make = CONFIGS[case]
    config = make()
    config.architectures = [AutoModelForImageTextToText._model_mapping[type(config)].__name__]
    assert config.architectures[0] in CHECKED
    assert architecture(text_model(config)).name == name


def test_all_that_are_known_are_documented_and_have_a_case() -> None:
    text = (DOCS / "exports.md").read_text(encoding="utf-8")
    assert re.findall(r"\| `(\w+ForConditionalGeneration)` \|", text) == list(CHECKED)
    assert len(CHECKED) == len(CONFIGS)


@pytest.mark.runtimes
@pytest.mark.heavy
@pytest.mark.parametrize("case", CONFIGS)
def test_float_matrices_give_the_text_models_own_logits(tmp_path: Path, case: str) -> None:
    pytest.importorskip("llama_cpp", reason="pip install 'lowbit[llamacpp]'")
    from test_llamacpp import through_the_table

    from lowbit.exporters.llamacpp import open_session

    run = run_of(tmp_path, case, "fp8-tensora16:f32")
    made = lowbit.export(run, "gguf")
    assert [line for line in made.warnings if line.startswith("the file has the text model of a ")]
    ids = tiny_ids(1, 48) % 90
    with torch.no_grad(), open_session(made.out, 64, exact=True) as session:
        theirs, ours = session.logits(ids[0].tolist()), through_the_table(lowbit.load(run))(ids).logits[0]
    assert float((theirs - ours).abs().max()) < EXCEPT.get(case, CLOSE) * float(ours.std())


@pytest.mark.runtimes
@pytest.mark.heavy
def test_verify_runs_the_text_model_in_llamacpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="pip install 'lowbit[llamacpp]'")
    run = run_of(tmp_path, "lfm2-vl", "w4a16g32-sym")
    (found,) = lowbit.verify(run, [lowbit.export(run, "gguf").out])
    assert found.ok
    assert found.logits is not None
    assert found.logits < 0.02
