"""``lowbit fit`` for onnxruntime and executorch, and within a memory: bytes, formats, refusals."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

import gguf_models
import lowbit
from lowbit.allocation import api
from lowbit.allocation.goal import Goal
from lowbit.allocation.kv_memory import context_of, kv_bytes
from lowbit.allocation.losses import formats_of
from lowbit.allocation.scheme import scheme_of
from lowbit.allocation.steps import weight_bytes
from lowbit.allocation.target import TARGETS, footprint_of
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.exporters.footprint import Choice, FloatModel, Footprint, Option
from lowbit.exporters.linear_footprint import PackedLinears
from lowbit.exporters.onnx_footprint import STORES as ONNX
from lowbit.exporters.pte_footprint import STORES as PTE
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import shapes_of
from lowbit.pipeline.opened import open_model
from lowbit.quant.integer import IntFormat
from lowbit.runs.plan import linear_shapes
from tiny import save_tiny

OUTSIDE = ("model.embed_tokens", "lm_head")
BUILDER = ("onnx", "onnxruntime", "onnxruntime_genai")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in BUILDER), reason="pip install 'lowbit[onnx]'"
)


def footprint_at(model: Path, target: str) -> Footprint:
    return footprint_of(target, str(model), open_model(str(model), None, False, False))


def exported(tmp_path: Path, family: str, target: str, **options: Any) -> tuple[int, int, Footprint]:
    """Bytes of the export of one random assignment, those that were computed, and the footprint."""
    model, draw = tmp_path / "model", random.Random(2)
    save_tiny(model, family)
    footprint = footprint_at(model, target)
    picks = [draw.randrange(len(choice.options)) for choice in footprint.choices]
    size = footprint.fixed + sum(c.options[at].size for c, at in zip(footprint.choices, picks, strict=True))
    scheme = scheme_of(formats_of(footprint.choices, picks), OUTSIDE)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(scheme))
    given: dict[str, Any] = {"recipe": "rtn", "data": str(model / "calib.txt"), "samples": 2, "length": 16}
    run = lowbit.quantize(str(model), tmp_path / "run", scheme=str(tmp_path / "s.yaml"), target=target, **given)
    return weight_bytes(lowbit.export(run.out, target, **options).out), size, footprint


def slack(stores: PackedLinears, layers: int) -> int:
    """What a bound on the graph may be too large by: all of it."""
    return stores.graph[0] + layers * stores.graph[1]


@needs_onnx
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_bytes_of_an_onnx_folder_are_known_but_for_its_graph(family: str, tmp_path: Path) -> None:
    """An untied and a tied model, with a format of its own for every linear."""
    actual, size, footprint = exported(tmp_path, family, "onnxruntime")
    assert size - slack(ONNX, 3) < actual <= size
    data = (tmp_path / "run-onnx" / "model.onnx.data").stat().st_size
    assert data == size - slack(ONNX, 3)  # tensors are counted to the byte
    own = [1, 1] if family == "llama" else [2]  # q, k and v have one format
    assert [len(choice.modules) for choice in footprint.choices] == [3, 1, 1, 1, 1] * 3 + own


def test_the_bytes_of_a_program_are_known_but_for_its_graph(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="pip install 'lowbit[executorch]'; make test-runtimes does")
    actual, size, _ = exported(tmp_path, "llama", "executorch", context=64)
    assert size - slack(PTE, 3) < actual <= size


def test_a_program_that_was_measured_has_the_bytes_that_are_computed() -> None:
    """SmolLM2 at w4a16g32-sym, embedding and head in float: the file of docs/executorch.json."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    skeleton = Skeleton(config)
    shapes = {name: tuple(shape) for name, shape in shapes_of(skeleton).items()}
    none = Checkpoint.__new__(Checkpoint)  # sizes are of shapes alone
    model = FloatModel(config, Path(), "smol", none, shapes, linear_shapes(skeleton), *OUTSIDE, tied=True)
    footprint = TARGETS["executorch"].footprint(model, skeleton, None)
    wanted = IntFormat(4, 32)
    size = footprint.fixed + sum(
        next(o.size for o in c.options if o.format == (None if c.modules == OUTSIDE else wanted))
        for c in footprint.choices
    )
    measured = json.loads((Path(__file__).parents[1] / "docs/executorch.json").read_text())["bytes"]
    assert 0 <= size - measured < slack(PTE, 30)
    assert slack(PTE, 30) < 0.003 * measured


@pytest.mark.parametrize(
    ("target", "family", "said"),
    [
        ("onnxruntime", "opt", "onnxruntime does not support this model: OPTForCausalLM; supported"),
        ("onnxruntime", "mixtral", "onnxruntime does not support this model"),
        ("executorch", "gemma2", "executorch does not support this model: model_type gemma2"),
    ],
)
def test_a_model_that_a_target_does_not_compute_is_one_line(
    target: str, family: str, said: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path, family)
    with pytest.raises(LowbitError, match=said) as caught:
        footprint_at(tmp_path, target)
    assert "\n" not in str(caught.value)


def test_a_linear_without_a_format_is_named_with_what_to_do(tmp_path: Path) -> None:
    """Widths of 88: no power of two from 16 up divides them."""
    save_tiny(tmp_path, "llama", intermediate_size=88)
    with pytest.raises(
        LowbitError, match=r"onnxruntime has no format for a linear.*\.mlp\.down_proj: .*transformers"
    ):
        footprint_at(tmp_path, "onnxruntime")


def test_what_a_target_leaves_float_has_no_format_and_a_tied_matrix_is_counted_as_it_is_stored(
    tmp_path: Path,
) -> None:
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    matrix = 96 * 64 * 4
    (onnx,) = (c for c in footprint_at(tmp_path, "onnxruntime").choices if OUTSIDE[0] in c.modules)
    assert onnx.options == (Option(None, matrix),)
    (pte,) = (c for c in footprint_at(tmp_path, "executorch").choices if OUTSIDE[0] in c.modules)
    assert pte.options[-1] == Option(None, 2 * matrix)
    sizes = {option.format: option.size for option in pte.options}
    assert sizes[IntFormat(8)] == 2 * 96 * (64 + 4)
    assert sizes[IntFormat(4, 32)] == 96 * (64 + 2 * 4) + 96 * (32 + 2 * 2)


def test_keys_and_values_are_counted_for_the_context(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    skeleton = open_model(str(tmp_path), None, False, False).skeleton
    assert context_of(skeleton, None) == 128
    assert kv_bytes(skeleton, "llama.cpp", 100) == 2 * 3 * 2 * 16 * 100 * 2
    assert kv_bytes(skeleton, "onnxruntime", 100) == 2 * kv_bytes(skeleton, "llama.cpp", 100)
    with pytest.raises(LowbitError, match="--context 129 given; allowed: 2 to 128"):
        context_of(skeleton, 129)
    with pytest.raises(LowbitError, match="does not keep every weight packed in memory: give --size"):
        kv_bytes(skeleton, "transformers", 100)


@pytest.mark.parametrize(
    ("case", "numbers"),
    # Of four layers the last two take keys and values of the first two; heads of 16 and 32 channels.
    [("gemma4", 2 * 16 + 2 * 32), ("gemma4-large", 2 * 16 + 2 * 16 + 1 * 32), ("qwen3.5", 2 * 16)],
)
def test_keys_and_values_are_counted_layer_by_layer(case: str, numbers: int, tmp_path: Path) -> None:
    gguf_models.saved(tmp_path, case)
    skeleton = open_model(str(tmp_path), None, False, False).skeleton
    assert kv_bytes(skeleton, "llama.cpp", 100) == 2 * numbers * 100 * 2


def test_a_memory_is_the_file_and_keys_and_values() -> None:
    small = Choice(("a",), 4, (Option(IntFormat(4), 10_000), Option(IntFormat(8), 20_000)))
    footprint, goal = Footprint(1000, (small,)), Goal.of(None, None, None, "15kB")
    assert goal.room(footprint) == 15_000
    goal.behind(3000).check(footprint, "llama.cpp")
    said = "15,000 bytes given, keys and values take 5,000 of them; .* smallest that can be is --memory 16.0kB"
    with pytest.raises(LowbitError, match=said):
        goal.behind(5000).check(footprint, "llama.cpp")
    assert Goal.of(None, None, None, "16.0kB").behind(5000).room(footprint) == footprint.least


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--memory", "10kB"], "smallest that can be is --memory"),
        (["--memory", "lots"], "--memory lots given"),
        (["--memory", "1MB", "--context", "4096"], "--context 4096 given; allowed: 2 to 128"),
        (["--memory", "1MB", "--size", "1MB"], "give one of --size, --memory, --bits and --quality"),
        (["--size", "1MB", "--context", "64"], "--context 64 given without --memory"),
        (["--frontier", "--memory", "1MB"], "leave one out"),
    ],
)
def test_what_cannot_be_reached_in_memory_is_one_line_before_any_work(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model", "llama")
    capsys.readouterr()  # transformers tells of its shards
    words = ["fit", str(tmp_path / "model"), "--target", "executorch", "-o", str(tmp_path / "out")]
    assert call([*words, *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


@needs_onnx
def test_one_command_makes_an_onnx_folder_within_a_memory(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    text = str(tmp_path / "model/calib.txt")
    room = footprint_at(tmp_path / "model", "onnxruntime").least + 2 * 3 * 2 * 16 * 64 * 4 + 30_000
    given: dict[str, Any] = {"data": text, "samples": 2, "length": 24, "text": text, "tokens": 48}
    made = api.fit(str(tmp_path / "model"), tmp_path / "out", target="onnxruntime", memory=room, context=64, **given)
    assert made.verified
    assert weight_bytes(made.file) == made.size_bytes <= made.expected_bytes
    assert made.memory_bytes == made.size_bytes + 2 * 3 * 2 * 16 * 64 * 4 <= room
    assert made.expected_bytes > room - 2 * 3 * 2 * 16 * 64 * 4 - 30_000
