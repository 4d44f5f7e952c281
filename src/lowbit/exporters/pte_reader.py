"""Reads the constants of a ``.pte`` file through ExecuTorch's own deserializer, in the order of their use.

A program is a list of instructions. Those of XNNPACK contain a graph of their own, a flatbuffer whose schema ships
with the package; its constants are stored in the file under the hash of their bytes. Neither keeps the model's names,
so a parameter is identified by its position: the third ``linear`` of the program is the third that the model runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lowbit.exporters.xnnpack import unpack

SCHEMA, LOOKUP, INT8 = "schema.fbs", "quantized_decomposed::embedding_byte", "qcint8"
LINEAR, GAIN, EMBEDDING = "linear", "gain", "embedding"
_FLOAT, _PREFIX = "xnn_datatype_fp32", "xnn_datatype_"


@dataclass(frozen=True)
class Constant:
    """One operator's parameters.

    Attributes:
        kind: ``linear``, ``gain`` (a norm's vector) or ``embedding``.
        weight: values in float32, in the shape of the model's parameter.
        bias: the same for a linear's bias.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None = None


def constants(path: Path) -> Iterator[Constant]:
    """Parameters of the file's ``forward`` in the order of its instructions."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall

    file = deserialize_pte_binary(path.read_bytes())
    named = file.named_data
    data = {key: bytes(named.buffers[entry.buffer_index]) for key, entry in named.pte_data.items()} if named else {}
    program = file.program
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    for instruction in (one.instr_args for chain in plan.chains for one in chain.instructions):
        if not isinstance(instruction, DelegateCall | KernelCall):
            continue
        values = [plan.values[i].val for i in instruction.args]
        if isinstance(instruction, KernelCall) and plan.operators[instruction.op_index].name == LOOKUP:
            yield _embedding(program, values[0], values[1])
            continue
        yield from filter(None, (_program_constant(program, value) for value in values))
        if isinstance(instruction, DelegateCall):
            blob = program.backend_delegate_data[plan.delegates[instruction.delegate_index].processed.index].data
            yield from _delegate(bytes(blob), data)


def _program_constant(program: Any, value: Any) -> Constant | None:
    """A parameter that the program itself holds and passes to an operator; ``None`` for any other value."""
    if not hasattr(value, "data_buffer_idx") or value.allocation_info is not None or not value.data_buffer_idx:
        return None
    kind, shape = {1: GAIN, 2: EMBEDDING}.get(len(value.sizes)), tuple(value.sizes)
    if kind is None or value.scalar_type.name != "FLOAT":  # a scalar, or a table of the rotary embedding
        return None
    return Constant(kind, _floats(_storage(program, value), shape))


def _embedding(program: Any, codes: Any, scales: Any) -> Constant:
    """A quantized embedding ``(rows, columns)``: int8 codes, float32 scales per row or group."""
    rows, columns = codes.sizes
    factors = _storage(program, scales)[: 4 * int(torch.Size(scales.sizes).numel())]
    return Constant(EMBEDDING, unpack(_storage(program, codes), factors, INT8, (rows, columns)))


def _storage(program: Any, value: Any) -> bytes:
    """A constant's bytes, padding included."""
    return bytes(program.constant_buffer[value.data_buffer_idx].storage)


def _floats(raw: bytes, shape: tuple[int, ...]) -> Tensor:
    """The float32 values of ``raw``, without the padding after the last one."""
    count = int(torch.Size(shape).numel())
    return torch.frombuffer(bytearray(raw[: 4 * count]), dtype=torch.float32).reshape(shape)


def _delegate(blob: bytes, data: Mapping[str, bytes]) -> Iterator[Constant]:
    """The linears of one XNNPACK graph, in order."""
    graph = _graph(blob)
    values = {}
    for entry in graph["xvalues"]:
        value = entry["xvalue_union"]
        values[value.get("tensor_value", value)["id_out"]] = value
    for node in graph["xnodes"]:
        content = node["xnode_union"]
        if node["xnode_union_type"] == "XNNFullyConnected":
            weight = _value(values[content["filter_id"]], graph, data)
            bias = _value(values[content["bias_id"]], graph, data) if content["bias_id"] in values else None
            if weight is not None:
                yield Constant(LINEAR, weight, bias)


def _graph(blob: bytes) -> dict[str, Any]:
    """A delegate's graph as plain data, decoded by ``flatc``."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as serializer
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = serializer.XNNHeader.from_bytes(blob[: serializer.XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / SCHEMA).write_bytes(serializer._get_schema_bytes())
        (folder / "graph.bin").write_bytes(blob[start : start + header.flatbuffer_size])
        _flatc_decompile(temporary, str(folder / SCHEMA), str(folder / "graph.bin"), ["--raw-binary"])
        content: dict[str, Any] = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    return content


def _value(value: Mapping[str, Any], graph: Mapping[str, Any], data: Mapping[str, bytes]) -> Tensor | None:
    """A constant value, dequantized; ``None`` for a computed one."""
    tensor = value.get("tensor_value", value)
    if not tensor["constant_buffer_idx"]:
        return None
    raw, shape = _bytes(graph, tensor["constant_buffer_idx"], data), tuple(tensor["dims"])
    if "quant_params" not in value:
        if tensor["datatype"] != _FLOAT:
            raise ValueError(f"a constant has the type {tensor['datatype']}")
        return _floats(raw, shape)
    scales = _bytes(graph, value["quant_params"]["scale_buffer_idx"], data)
    return unpack(raw, scales, tensor["datatype"].removeprefix(_PREFIX), (shape[0], shape[1]))


def _bytes(graph: Mapping[str, Any], index: int, data: Mapping[str, bytes]) -> bytes:
    entry = graph["constant_data"][index]
    return data[entry["named_key"]][: entry["size"]]
