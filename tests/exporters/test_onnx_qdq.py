"""Static inputs and weights of any format in standard ONNX operators: values, products in onnxruntime, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_onnx import greedy
from torch import Tensor

import lowbit
import tiny
from contracts import COLUMNS, extreme_rows, hard_rows
from lowbit.errors import LowbitError
from lowbit.exporters import onnx_qdq
from lowbit.exporters.onnx_codes import kind_of
from lowbit.exporters.onnx_names import split_or_fuse
from lowbit.exporters.onnx_read import load_graph
from lowbit.exporters.run import Run, open_run
from lowbit.exporters.verify import relative_error
from lowbit.quant.floating import FLOATS, FP8_BLOCK
from lowbit.quant.format import QParams, QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import KQuant
from lowbit.quant.scheme_names import WEIGHTS
from runs import quantize_tiny
from tiny import save_tiny, tiny_ids

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

# The tiny models' own width equals their vocabulary, which the builder takes for the head.
WIDTH = 128
# family, changes to its config, scheme, overrides; each starts the builder, which takes seconds
MIXED = {"*.0.mlp.down_proj": "fp8", "*.1.mlp.*": "float", "lm_head": "w6"}
CASES: list[Any] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}, "w8a8-static", {"*.q_proj": "w4g16", **MIXED}),
    ("phi3", {"sliding_window": 8}, "w4a16-asym-static", {}),
    pytest.param("qwen3", {"tie_word_embeddings": True}, "fp8a16", {}, marks=pytest.mark.slow),
    pytest.param("gemma2", {"dtype": "bfloat16"}, "w4a8-sym-static", {}, marks=pytest.mark.slow),
    pytest.param("llama", {}, "mxfp4a16", {"*.v_proj": "iq4_nl"}, marks=pytest.mark.slow),
    pytest.param("phi3", {}, "nvfp4a16", {"*.down_proj": "mxfp6"}, marks=pytest.mark.slow),
    pytest.param("qwen2", {}, "mxfp8a16", {"lm_head": "fp8-tensor"}, marks=pytest.mark.slow),
    pytest.param("llama", {"tie_word_embeddings": True}, "w3a8g32-static", {"lm_head": "w8"}, marks=pytest.mark.slow),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("family", "changes", "scheme", "overrides"), CASES)
def test_every_value_is_read_back_and_the_logits_are_the_simulated_ones(
    tmp_path: Path, family: str, changes: dict[str, Any], scheme: str, overrides: dict[str, str]
) -> None:
    save_tiny(tmp_path / "model", family, intermediate_size=WIDTH, **changes)
    run = quantize_tiny(tmp_path / "model", tmp_path / "run", scheme, overrides=overrides).out
    with pytest.raises(LowbitError, match=r"--accuracy-level 4 given; .* leave the option out"):
        lowbit.export(run, "onnx", accuracy_level=4)
    made = lowbit.export(run, "onnx").out
    (found,) = lowbit.verify(run, [made])
    assert found.ok
    assert found.exact == found.tensors >= 20
    assert found.logits is not None
    assert found.logits < (1e-3 if "a16" in scheme and "static" in scheme else 1e-5)
    settings = json.loads((made / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert settings.items() >= onnx_qdq.SESSION.items()
    ids = tiny_ids(1, 6)
    with torch.no_grad():
        expected = lowbit.load(run).generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    continued = greedy(made, ids[0].tolist(), 8)  # without the end-of-text token
    assert continued == expected[: len(continued)]
    assert len(expected) - len(continued) in (0, int(expected[-1] == 2))
    exchange_scales(made)
    (found,) = lowbit.verify(run, [made])
    assert found.differs
    assert all(".2.mlp.gate_" in name or ".2.mlp.up_" in name for name in found.differs)
    assert found.other == ["model.onnx"]


def exchange_scales(made: Path) -> None:
    """Of the gate and the up projection of one layer."""
    model = load_graph(made)
    nodes = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    gate, up = (nodes[f"model.layers.2.mlp.{part}_proj{onnx_qdq.WEIGHT}"] for part in ("gate", "up"))
    gate.input[1], up.input[1] = up.input[1], gate.input[1]
    onnx.save(model, made / "model.onnx")


# Without the builder: one layer's linears, each on an input of its own.

LINEARS = [
    *("w8a8-static", "w8a8-sym-static", "w8a8-asym-static", "w2a8-static", "w4a8g16-static", "w3a8g32-asym-static"),
    *("w4a16-static", "w5a16-sym-static", "w8a16g16-asym-static", "w8a16g32-sym-static", "w4a16g16-static"),
    *("fp8a16", "fp8-blocka16", "mxfp8a16", "mxfp6a16", "mxfp4a16", "nvfp4a16", "iq4_nl", "q2_0"),
]


@pytest.mark.parametrize("scheme", LINEARS)
def test_a_linear_computes_what_the_simulation_computes(scheme: str, run_of: Callable[..., Path]) -> None:
    run = open_run(run_of(scheme, overrides={"*.down_proj": "w4g32"} if scheme == "q2_0" else {}))
    model = linears_of(run)
    onnx_qdq.put_in(model, run)
    assert {node.op_type for node in model.graph.node} <= {"QuantizeLinear", "DequantizeLinear", "MatMul"}
    read = read_back(run, model)
    wanted = {f"{name}.weight" for name in modules(run)} | {n for n in run.inputs if n.startswith("model.layers.0.")}
    assert set(read) == wanted
    for name, value in read.items():
        expected = run.qtensor(name[:-7]).dequantize() if name.endswith(".weight") else run.tensor(name).float()
        assert torch.equal(value, expected.float())
    options = onnxruntime.SessionOptions()
    for key, value in onnx_qdq.SESSION.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    simulated = lowbit.load(run.folder)
    x = torch.randn(1, 40, WIDTH, generator=torch.Generator().manual_seed(3))
    linears = {name: simulated.get_submodule(name) for name in modules(run)}
    given = {name: x[..., : linear.in_features] for name, linear in linears.items()}
    outputs = session.run(list(linears), {f"{name}.x": value.numpy() for name, value in given.items()})
    for (name, linear), ours in zip(linears.items(), outputs, strict=True):
        with torch.no_grad():
            assert relative_error(torch.from_numpy(ours), linear(given[name])) < 1e-5


def modules(run: Run) -> list[str]:
    return [name for name in run.quantized if name.startswith("model.layers.0.")]


def linears_of(run: Run) -> Any:
    """A float graph as the builder's, its weights zeros; every linear has an input and an output of its own."""
    nodes, weights, inputs, outputs = [], [], [], []
    for name in modules(run):
        rows, columns = run.subject.shapes[name]
        weight = name.replace(".self_attn.", ".attn.") + onnx_qdq.WEIGHT
        weights.append(onnx.numpy_helper.from_array(torch.zeros(columns, rows).numpy(), weight))
        inputs.append(onnx.helper.make_tensor_value_info(f"{name}.x", onnx.TensorProto.FLOAT, [1, None, columns]))
        outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, None, rows]))
        nodes.append(onnx.helper.make_node("MatMul", [f"{name}.x", weight], [name]))
    graph = onnx.helper.make_graph(nodes, "linears", inputs, outputs, weights)
    opset = onnx.helper.make_opsetid("", onnx_qdq.OPSET)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)


def read_back(run: Run, model: Any) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for linear in onnx_qdq.linears(model):
        for key, value in onnx_qdq.values(linear, ""):
            out |= split_or_fuse(run, f"{linear.name.removesuffix('.weight')}.{key}", value, {})
    return out


def test_linears_with_one_input_share_its_codes(run_of: Callable[..., Path]) -> None:
    run = open_run(run_of("w8a8-static"))
    model = linears_of(run)
    for node in model.graph.node:
        if node.input[1].endswith(("q_proj.MatMul.weight", "k_proj.MatMul.weight", "v_proj.MatMul.weight")):
            node.input[0] = "x"
    onnx_qdq.put_in(model, run)
    readers = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "x"]
    assert len(readers) == 1
    read = read_back(run, model)
    scales = [read[f"model.layers.0.self_attn.{part}_proj.input_scale"] for part in "qkv"]
    assert all(torch.equal(scale, scales[0]) for scale in scales)


@pytest.mark.parametrize("format", [f for f in FLOATS.values() if f.elements.name == "E4M3"], ids=lambda f: f.name)
def test_codes_of_fp8_are_the_bits_of_its_elements(format: Any) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    weight[0], weight[1, 0] = 0.0, -0.0
    q = format.quantize(weight, format.qparams(weight))
    stored = onnx_qdq.Codes.of(q)
    elements = stored.codes.view(torch.float8_e4m3fn).float()
    assert stored.block == (format.group or 256)
    scale = stored.scale.repeat_interleave(stored.block, 0)
    assert torch.equal((elements * scale).T, q.dequantize())
    assert len(stored.scale) == 256 // (format.group or 256)
    assert stored.zero is None


WHOLE = ("mxfp4", "mxfp6", "nvfp4", "iq4_nl", "q2_0", "q3_k", "q6_k")


@pytest.mark.parametrize("rows", [hard_rows, extreme_rows], ids=lambda rows: rows.__name__)
@pytest.mark.parametrize("name", WHOLE)
def test_codes_of_other_formats_are_integers_with_the_same_products(name: str, rows: Any) -> None:
    """Element for element: the run's codes come back from them, and every value is equal."""
    format = WEIGHTS[name]
    weight = rows(torch.float32, COLUMNS)
    q = format.quantize(weight, format.qparams(weight))
    stored = onnx_qdq.Codes.of(q)
    assert stored.kind == ("INT4" if name in ("q2_0", "q3_k") else "INT8")
    assert stored.block == format.group
    assert (stored.zero is None) == (name != "iq4_nl")
    assert stored.zero is None or not stored.zero.any()
    steps = stored.codes.view(torch.int8).T.float()
    scale = stored.scale.T.repeat_interleave(stored.block, 1)
    assert torch.equal(steps * scale, q.dequantize())
    units = {"mxfp4": 2, "nvfp4": 2, "mxfp6": 8}.get(name, 1)
    if isinstance(format, KQuant):
        codes = steps + 2 ** (format.bits - 1)
    else:
        codes = format.elements.code(steps / units)
    assert torch.equal(codes.to(torch.uint8), q.codes)
    assert torch.equal(stored.scale.T * units, q.qparams.scale)


def test_formats_that_have_no_integers() -> None:
    assert {name for name, format in WEIGHTS.items() if kind_of(format) is None} == {"q2_k", "q4_k", "q5_k"}


def test_tiles_have_their_scale_in_every_row() -> None:
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(1))
    stored = onnx_qdq.Codes.of(FP8_BLOCK.quantize(weight, FP8_BLOCK.qparams(weight)))
    scale = stored.scale
    assert scale.shape == (2, 200)
    assert stored.block == 128
    assert bool((scale[:, :128] == scale[:, :1]).all())


def test_an_odd_number_of_nibbles_is_padded() -> None:
    q = QTensor(
        torch.tensor([[1, 2, 3]], dtype=torch.uint8), QParams(torch.ones(1, 1), torch.full((1, 1), 8.0)), IntFormat(4)
    )
    stored = onnx_qdq.Codes.of(q)
    tensor = onnx_qdq.tensor("w", stored.kind, stored.codes.shape, stored.codes)
    assert tensor.raw_data == bytes([0xA9, 0x0B])  # -7, -6, then -5
    assert onnx.numpy_helper.to_array(tensor).astype(int).tolist() == [[-7], [-6], [-5]]


# What does not fit.


@pytest.mark.parametrize(
    ("scheme", "overrides", "message"),
    [
        ("w8a8g16-static", {}, r"weight: .*groups of 8-bit codes behind 8-bit inputs.*fits: w8a8-static$"),
        ("w6a8g32-sym-static", {}, r"weight: .*behind 8-bit inputs.*fits: w6a8-sym-static$"),
        ("w8a8kv8-static", {}, r"kv: .*nearest that fits: w8a8-static$"),
        ("w8a8-static", {"model.embed_tokens": "w8"}, r"override .*: quantized embeddings are not supported"),
        ("w8a8-static", {"*.down_proj": "mxfp4"}, r"override .*8-bit codes behind 8-bit inputs.*fits: --override"),
        ("nvfp4", {}, r"act: inputs are quantized to nvfp4; the graph has static integers, or floats; nearest"),
        ("fp8", {}, r"act: inputs are quantized to .*; the graph has static integers, or floats"),
    ],
)
def test_what_onnxruntime_does_not_run_is_refused(
    scheme: str, overrides: dict[str, str], message: str, narrow: None, refusal_of: Callable[..., str]
) -> None:
    assert re.search(message, refusal_of("onnx", scheme, "llama", overrides))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models whose width differs from their vocabulary."""
    monkeypatch.setitem(tiny.COMMON, "intermediate_size", WIDTH)


def test_a_linear_that_the_builder_takes_for_the_head_is_refused(refusal_of: Callable[..., str]) -> None:
    assert "mlp.gate_proj has as many rows as the vocabulary" in refusal_of("onnx", "w8a8-static")


def test_a_minimum_of_each_group_is_refused(monkeypatch: pytest.MonkeyPatch, refusal_of: Callable[..., str]) -> None:
    monkeypatch.setitem(tiny.COMMON, "intermediate_size", 256)
    found = refusal_of("onnx", "w4a16-static", "llama", {"*.down_proj": "q4_k"})
    assert re.search(r"override .*q4_k has a minimum of each group.*fits: --override", found)


def test_other_targets_name_static_inputs(refusal_of: Callable[..., str]) -> None:
    for name in ("gguf", "gptq", "executorch", "vllm"):
        assert re.search(r"act: inputs are quantized to a8-asym-static", refusal_of(name, "w4a8g32-static"))
    assert refusal_of("gguf", "w4a16g32-static").endswith("nearest that fits: w4a16g32-sym")
