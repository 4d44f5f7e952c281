"""An ONNX folder holds the run's own codes and qparams, ONNX Runtime computes its logits, verify sees wrong bytes."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lowbit
from lowbit.checkpoints.resolve import load_config
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.exporters import onnx as target
from lowbit.exporters.onnx_build import _complete_config
from lowbit.exporters.onnx_grid import block_of, in_blocks, stored_bits
from lowbit.exporters.verify import relative_error
from lowbit.quant.integer import IntFormat
from tiny import quantized, save_tiny, tiny_ids

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
og = pytest.importorskip("onnxruntime_genai")

ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Width 96 for groups of 48, which become blocks of 16.
WIDE = {"hidden_size": 96, "head_dim": 48, "rope_parameters": {**ROPE, "original_max_position_embeddings": 32}}
MIXED = {"*.o_proj": "w8-asym", "*.0.mlp.down_proj": "w3g16"}
# family, changes to its config, scheme, overrides; each starts the builder, which takes seconds
CASES: list[Any] = [
    pytest.param("llama", {}, "w4a16g32-sym", MIXED, marks=pytest.mark.slow),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, "w2a16-asym", MIXED),
    pytest.param("llama", WIDE, "w4a16g48-asym", {}, marks=pytest.mark.slow),
    pytest.param("mistral", {"sliding_window": 8}, "w8a16g16-asym", {}, marks=pytest.mark.slow),
    pytest.param("qwen2", {}, "w4a16g32-sym", {"lm_head": "w8g32"}, marks=pytest.mark.slow),
    ("qwen3", {"tie_word_embeddings": True}, "w3a16-sym", {"lm_head": "w6"}),
    ("gemma2", {"dtype": "bfloat16"}, "w4a16g32-sym", {}),
    pytest.param("phi3", {"sliding_window": 8}, "w5a16g32-sym", {}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def run(run_of: Callable[..., Path]) -> Path:
    return run_of("w4a16g32-asym")


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export; whoever asks for it starts the builder."""
    return lowbit.export(run, "onnx", out=tmp_path_factory.mktemp("onnx") / "made").out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.heavy
@pytest.mark.parametrize(("family", "changes", "scheme", "overrides"), CASES)
def test_every_family_reads_back_bit_for_bit_and_computes_the_same(
    tmp_path: Path, family: str, changes: dict[str, Any], scheme: str, overrides: dict[str, str]
) -> None:
    save_tiny(tmp_path / "model", family, **changes)
    text = str(tmp_path / "model" / "calib.txt")
    more = {"overrides": overrides, "data": text, "samples": 2, "length": 16}
    run = lowbit.quantize(str(tmp_path / "model"), tmp_path / "run", scheme=scheme, recipe="rtn", **more).out
    made = lowbit.export(run, "onnx")
    (found,) = lowbit.verify(run, [made.out])
    assert found.ok
    assert found.exact == found.tensors >= 20
    assert found.logits is not None
    assert found.logits < 2e-6  # the operator multiplies by the same values; only sums have another order


@pytest.mark.heavy
def test_who_reads_the_graph_reads_its_data(made: Path) -> None:
    assert (made / "model.onnx.data").stat().st_mode == (made / "model.onnx").stat().st_mode


@pytest.mark.heavy
def test_genai_continues_like_the_simulation(run: Path, made: Path) -> None:
    ids = tiny_ids(1, 6)
    with torch.no_grad():
        expected = lowbit.load(run).generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    assert greedy(made, ids[0].tolist(), 20) == expected


def greedy(folder: Path, ids: list[int], new: int) -> list[int]:
    """Ids and their continuation in onnxruntime-genai, which starts from the prompt's cache at each token."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(ids) + new)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(i) for i in generator.get_sequence(0)]


@pytest.mark.heavy
def test_level_4_rounds_inputs_and_says_so(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "level4"
    assert call(["export", str(run), "--to", "onnxruntime", "--out", str(out), "--accuracy-level", "4"]) == 0
    (found,) = lowbit.verify(run, [out])
    assert found.ok
    assert found.logits is not None
    # The simulation rounds the same inputs, but for the few that lie at a tie; against float inputs it is 0.02.
    assert found.logits < 0.005
    ids = tiny_ids(1)[0]
    executed = target.execute(out, ids)
    assert executed is not None
    with torch.no_grad():
        rounded, plain = (lowbit.load(run, target=name)(ids[None]).logits[0] for name in ("onnxruntime", "float"))
    assert relative_error(executed.logits, rounded) < 1e-5 < 0.01 < relative_error(executed.logits, plain)
    with pytest.raises(LowbitError, match="allowed: 0, 4"):
        lowbit.export(run, "onnx", out=tmp_path / "level2", accuracy_level=2)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("symmetric", "size"), [(True, 48), (False, None)])
def test_blocks_hold_codes_and_qparams(bits: int, symmetric: bool, size: int | None) -> None:
    format = IntFormat(bits, size, symmetric)
    weight = torch.randn(6, 192, generator=torch.Generator().manual_seed(bits))
    q = format.quantize(weight, format.qparams(weight))
    stored = in_blocks(q)
    assert stored.format.elements.bits == stored_bits(bits)
    assert stored.format.group == block_of(size or 192)
    assert torch.equal(stored.dequantize(), q.dequantize())
    assert not symmetric or bool((stored.qparams.zero == 2 ** (stored.format.elements.bits - 1)).all())


PARTS = {
    "model.layers.1.attn.qkv_proj.MatMulNBits.qweight": "model.layers.1.self_attn.q_proj.weight",
    "model.layers.2.mlp.down_proj.MatMulNBits.scales": "model.layers.2.mlp.down_proj.weight",
    "model.layers.0.mlp.up_proj.MatMulNBits.qzeros": "model.layers.0.mlp.up_proj.weight",
    "model.layers.3.final_norm_layernorm.weight": "model.norm.weight",
    "lm_head.MatMul.weight": "lm_head.weight",
}


@pytest.mark.heavy
@pytest.mark.parametrize(("stored", "named"), PARTS.items())
def test_one_wrong_byte_of_external_data_is_named(run: Path, copy: Path, stored: str, named: str) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == stored)
    at = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    change(copy / "model.onnx.data", at + 2)
    (found,) = lowbit.verify(run, [copy])
    assert found.differs == [named]
    assert found.other == ["model.onnx.data"]
    assert call(["verify", str(run), str(copy)]) == 1


def change(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x11
    file.write_bytes(content)


@pytest.mark.heavy
def test_graph_settings_and_stray_files_are_seen(run: Path, copy: Path) -> None:
    graph = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(graph.replace(b"do_rotary", b"do_rotarz"))
    settings = json.loads((copy / "genai_config.json").read_text())
    settings["model"]["eos_token_id"] = 7
    (copy / "genai_config.json").write_text(json.dumps(settings))
    (copy / "more.bin").write_text("x")
    (found,) = lowbit.verify(run, [copy])
    assert found.other == ["genai_config.json", "model.onnx", "more.bin"]
    (copy / "model.onnx").write_bytes(graph[: len(graph) // 2])
    assert lowbit.verify(run, [copy])[0].unreadable


@pytest.mark.heavy
def test_external_data_outside_of_the_folder_is_not_read(run: Path, copy: Path) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../copy/model.onnx.data"
    onnx.save(model, copy / "model.onnx")
    assert lowbit.verify(run, [copy])[0].unreadable


@pytest.mark.heavy
def test_an_integer_changed_by_the_builder_is_refused(
    run: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(run: Any, path: Path, level: int) -> None:
        shutil.copytree(made, path)
        model = onnx.load(path / "model.onnx", load_external_data=False)
        (tensor,) = (t for t in model.graph.initializer if t.name.endswith("1.attn.o_proj.MatMulNBits.qweight"))
        change(path / "model.onnx.data", next(int(e.value) for e in tensor.external_data if e.key == "offset"))

    monkeypatch.setattr(target, "build", build)
    with pytest.raises(LowbitError, match=r"changes 'model.layers.1.self_attn.o_proj.weight'"):
        lowbit.export(run, "onnx", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_builder_that_gives_up_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nKeyError: 'rope_type'\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(LowbitError, match=r"builder failed on .*: KeyError: 'rope_type'$"):
        lowbit.export(run, "onnx", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.heavy
def test_a_missing_package_is_one_line(
    run: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else find(name, *rest)
    )
    for act in (lambda: lowbit.export(run, "onnx", out=tmp_path / "out"), lambda: lowbit.verify(run, [made])):
        with pytest.raises(LowbitError, match=r"pip install 'lowbit\[onnx\]'"):
            act()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "scheme", "more", "message"),
    [
        ("llama", "w4a4", {}, r"act: .*nearest that fits: w4a16-asym$"),
        ("llama", "w4a16kv8", {}, r"kv: .*nearest that fits: w4a16-sym$"),
        ("llama", "w4a16g8-sym", {}, r"weight: .*groups of 8.*nearest that fits: w4a16g32-sym$"),
        ("llama", "w4a16", {"overrides": {"*.1.mlp.up_proj": "float"}}, r"override .*stays float.*nearest that fits"),
        ("llama-odd", "w4a16", {}, r"architecture: 24 rotary dimensions"),
        ("gemma3", "w4a16", {}, r"architecture: Gemma3ForCausalLM"),
        ("opt", "w4a16", {}, r"architecture: OPTForCausalLM"),
    ],
)
def test_what_does_not_fit_is_refused(
    refusal_of: Callable[..., str], family: str, scheme: str, more: dict[str, Any], message: str
) -> None:
    assert re.search(message, refusal_of("onnx", scheme, family, **more))


@pytest.mark.heavy
@pytest.mark.slow
def test_smollm2_speaks_in_genai_as_in_the_simulation(tmp_path: Path) -> None:
    prompt = "The best way to learn a new language is"
    lowbit.quantize("demo", tmp_path / "run", scheme="w4a16g32-sym", recipe="rtn", samples=2, length=64)
    made = lowbit.export(tmp_path / "run", "onnx")
    (found,) = lowbit.verify(tmp_path / "run", [made.out])
    assert found.ok
    assert found.exact == found.tensors > 200
    tokenizer = og.Tokenizer(og.Model(str(made.out)))
    simulated = lowbit.load(tmp_path / "run")
    ids = [int(i) for i in tokenizer.encode(prompt)]
    with torch.no_grad():
        expected = simulated.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0].tolist()
    assert greedy(made.out, ids, 32) == expected


@pytest.mark.heavy
def test_a_layer_behind_one_whose_q_k_and_v_differ_reads_its_own_keys(tmp_path: Path) -> None:
    """The builder packs equal formats; behind a layer that it did not pack it would take that layer's keys."""
    folder = quantized(tmp_path, "w4a16g32-sym", overrides={"*.0.self_attn.k_proj": "w8g32"}, target="onnxruntime")
    made = lowbit.export(folder, "onnx", out=tmp_path / "mixed")
    (found,) = lowbit.verify(folder, [made.out])
    assert found.ok
    assert found.logits is not None


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_layers_of_a_config_without_their_types_are_those_that_transformers_derives(
    family: str, tmp_path: Path
) -> None:
    """Published configs of Gemma 2 name no types: half of the layers see the whole text."""
    changes = {} if family == "gemma2" else {"sliding_window": 8}
    save_tiny(tmp_path, family, **changes)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    _complete_config(tmp_path, load_config(tmp_path))
    types = json.loads((tmp_path / "config.json").read_text())["layer_types"]
    sliding, full = "sliding_attention", "full_attention"
    assert types[:2] == [sliding, full if family == "gemma2" else sliding]
    assert len(types) == config["num_hidden_layers"]
