"""Linears as standard ONNX operators: static integer inputs, and weights in any format that ``onnx_codes`` has.

::

    x ------ QuantizeLinear -- DequantizeLinear --.
                                                   MatMul -- y
    codes --------------------- DequantizeLinear --'

MatMulNBits has neither such inputs nor floating-point weights. Compilers for phones' NPUs read the pattern above, and
onnxruntime runs it on the CPU: inputs and weights of 8 bits with one scale per row as one integer product, all others
as values.

An input's codes are unsigned with a zero point, or signed without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.exporters.fit import Misfit, no_kv, weight_misfit
from lowbit.exporters.onnx_codes import Codes, kind_of
from lowbit.exporters.onnx_names import renamed, source_rows
from lowbit.exporters.run import Run, Subject
from lowbit.models.families import architecture_of
from lowbit.quant.format import QParams, QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.static_activations import StaticInt

OPSET = 21  # the first with 4-bit codes, 16-bit inputs and blocks
WEIGHT = ".MatMul.weight"  # ends the builder's names of float weights, (in, out)
SCALE, ZERO = "input_scale", "input_zero_point"
# Without the first, onnxruntime turns products with dequantized codes into MatMulNBits with inputs in 8 bits. Without
# the second, sums of two 8-bit products saturate on processors that have AVX2 and no VNNI.
SESSION = {"session.qdq_matmulnbits_accuracy_level": "0", "session.x64quantprecision": "1"}


def in_standard_operators(subject: Subject) -> bool:
    """Whether a subject has what MatMulNBits does not: static inputs, or weights in another format than integers."""
    modules = subject.formats.modules.values()
    return any(isinstance(own.input, StaticInt) or not isinstance(own.weight, IntFormat) for own in modules)


def limits(subject: Subject) -> Misfit | None:
    """Weights with a type of codes, inputs static or float; no groups of 8-bit integers behind 8-bit inputs."""
    architecture, vocabulary = architecture_of(subject.config), subject.config.vocab_size
    for name, (rows, _) in subject.shapes.items():
        if rows == vocabulary and name not in (architecture.embed, architecture.head):
            return Misfit(
                "architecture", f"{name} has as many rows as the vocabulary; the builder takes it for the head"
            )
    if subject.act is not None and not isinstance(subject.act, StaticInt):
        return Misfit("act", f"inputs are quantized to {subject.act.name}; the graph has static integers, or floats")
    for module, own in subject.formats.modules.items():
        if module == architecture.embed:
            return weight_misfit(subject, module, "quantized embeddings are not supported")
        kind = kind_of(own.weight)
        if kind is None:
            why = "a minimum of each group, which is no integer zero point"
            return weight_misfit(subject, module, f"{own.weight.name} has {why}")
        if (
            kind in ("INT8", "UINT8")
            and own.weight.group
            and isinstance(own.input, StaticInt)
            and own.input.bits <= 8
        ):
            return weight_misfit(
                subject, module, "groups of 8-bit codes behind 8-bit inputs; onnxruntime fails on these"
            )
    return no_kv(subject)


def put_in(model: Any, run: Run) -> None:
    """Replace the float weights of a run's quantized linears, and quantize their inputs, in the builder's graph.

    Args:
        model: the ``onnx.ModelProto`` of a float graph without packed linears; changed in place.
        run: the run.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    quantized_inputs: dict[tuple[str, bytes], str] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and (name := node.input[1]) in stored:
            module, rows = source_rows(run, renamed(name).removesuffix(".weight"))
            if module in run.quantized:
                graph.initializer.remove(stored[name])
                q = run.qtensor(module)
                part = QTensor(q.codes[rows], QParams(*(value[rows] for value in q.qparams)), q.format)
                nodes.append(_dequantize_weight(graph, name, Codes.of(part)))
                node.input[1] = nodes[-1].output[0]
                inputs = {
                    key: run.tensor(f"{module}.{key}") for key in run.subject.formats.modules[module].input_tensors
                }
                key = node.input[0], b"".join(value.numpy().tobytes() for value in inputs.values())
                if inputs and key not in quantized_inputs:
                    format = run.subject.formats.input(module)
                    assert isinstance(format, StaticInt), "other formats are refused before"
                    pair = _quantize_input(graph, name.removesuffix(WEIGHT), node.input[0], format, inputs)
                    nodes += pair
                    quantized_inputs[key] = pair[-1].output[0]
                node.input[0] = quantized_inputs.get(key, node.input[0])
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _dequantize_weight(graph: Any, name: str, weight: Codes) -> Any:
    from onnx import helper

    base = name.removesuffix(WEIGHT)
    blocks = len(weight.scale)
    shape = tuple(weight.scale.shape) if blocks > 1 else (weight.scale.shape[1],)
    parts = [tensor(f"{base}.codes", weight.kind, weight.codes.shape, weight.codes)]
    parts.append(tensor(f"{base}.scales", "FLOAT", shape, weight.scale))
    if weight.zero is not None:
        parts.append(tensor(f"{base}.zero_points", weight.kind, shape, weight.zero))
    graph.initializer.extend(parts)
    where = {"axis": 0, "block_size": weight.block} if blocks > 1 else {"axis": 1}
    return helper.make_node("DequantizeLinear", [t.name for t in parts], [name], f"/{base}/DequantizeLinear", **where)


def _quantize_input(graph: Any, base: str, x: str, format: StaticInt, inputs: Mapping[str, Tensor]) -> list[Any]:
    """The two nodes that round ``x`` to the values of a static format."""
    from onnx import helper

    kind = f"{'INT' if format.symmetric else 'UINT'}{format.bits}"
    dtype = {"INT8": torch.int8, "UINT8": torch.uint8, "INT16": torch.int16, "UINT16": torch.uint16}[kind]
    # Stored zero points are signed.
    zero = inputs[ZERO].int() - format.codes[0] if ZERO in inputs else torch.zeros(1, dtype=torch.int32)
    parts = [
        tensor(f"{base}.{SCALE}", "FLOAT", (), inputs[SCALE]),
        tensor(f"{base}.{ZERO}", kind, (), zero.to(dtype)),
    ]
    graph.initializer.extend(parts)
    names = [part.name for part in parts]
    codes, values = f"/{base}/input_codes", f"/{base}/input_values"
    return [
        helper.make_node("QuantizeLinear", [x, *names], [codes], f"/{base}/QuantizeLinear"),
        helper.make_node("DequantizeLinear", [codes, *names], [values], f"/{base}/DequantizeLinear_input"),
    ]


def tensor(name: str, kind: str, shape: tuple[int, ...] | torch.Size, value: Tensor) -> Any:
    """An initializer; 4-bit codes are packed two a byte, the first one low."""
    from onnx import TensorProto

    if kind in ("INT4", "UINT4"):
        nibbles = value.flatten() & 15
        low, high = torch.nn.functional.pad(nibbles, (0, len(nibbles) % 2)).unflatten(0, (-1, 2)).unbind(-1)
        value = low | high << 4
    raw = value.contiguous().numpy().tobytes()
    return TensorProto(name=name, data_type=TensorProto.DataType.Value(kind), dims=shape, raw_data=raw)


@dataclass(frozen=True)
class Linear:
    """A linear that is read back from a graph.

    Attributes:
        name: the model's name of the weight, as the graph has it.
        codes, scale, zero: initializers of the weight's DequantizeLinear; no ``zero``: 0.
        block: inputs that share a scale; 0: all.
        input_scale, input_zero: initializers of its input's, or ``None``.
    """

    name: str
    codes: Any
    scale: Any
    zero: Any | None
    block: int
    input_scale: Any | None
    input_zero: Any | None

    @property
    def initializers(self) -> set[str]:
        """Names of all of them."""
        parts = (self.codes, self.scale, self.zero, self.input_scale, self.input_zero)
        return {part.name for part in parts if part is not None}


def linears(model: Any) -> Iterator[Linear]:
    """Every MatMul of a graph with a dequantized weight."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantized = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type != "MatMul" or (weight := dequantized.get(node.input[1])) is None:
            continue
        codes, scale, *zero = (stored[name] for name in weight.input)
        behind = dequantized.get(node.input[0])
        inputs = [stored[name] for name in behind.input[1:]] if behind is not None else [None, None]
        block = next((attribute.i for attribute in weight.attribute if attribute.name == "block_size"), 0)
        yield Linear(renamed(weight.output[0]), codes, scale, zero[0] if zero else None, block, *inputs)


def values(linear: Linear, folder: str) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a linear in float32, its weight ``(out, in)``, by their names within the module."""
    codes = _floats(linear.codes, folder)

    def spread(part: Any) -> Tensor:
        values = _floats(part, folder)
        blocks = values[None] if values.dim() == 1 else values
        return blocks.repeat_interleave(linear.block or len(codes), 0)[: len(codes)]

    steps = codes if linear.zero is None else codes - spread(linear.zero)
    yield "weight", (steps * spread(linear.scale)).T.contiguous()
    if linear.input_scale is not None:
        yield SCALE, _floats(linear.input_scale, folder).reshape(1)
    if linear.input_zero is not None and (middle := unsigned_middle(linear.input_zero)):
        yield ZERO, _floats(linear.input_zero, folder).reshape(1) - middle


def unsigned_middle(zero: Any) -> int:
    """Half the number of codes of an unsigned input; 0 for a signed one."""
    from onnx import TensorProto

    return {TensorProto.UINT8: 128, TensorProto.UINT16: 32768}.get(zero.data_type, 0)


def input_bits(model: Any) -> int | None:
    """The fewest bits of a static input in a graph; ``None`` if there is none."""
    from onnx import TensorProto

    eight = (TensorProto.UINT8, TensorProto.INT8)
    bits = [8 if own.input_zero.data_type in eight else 16 for own in linears(model) if own.input_zero is not None]
    return min(bits, default=None)


def _floats(tensor: Any, folder: str) -> Tensor:
    import numpy as np
    from onnx.numpy_helper import to_array

    return torch.from_numpy(to_array(tensor, folder).astype(np.float32))
