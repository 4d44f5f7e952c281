"""What a ``.pte`` file holds, through ExecuTorch's own deserializer: constants in the order in which they are used.

A program is a list of instructions. Those of XNNPACK carry a graph of their own, a flatbuffer whose schema comes with
the package; its constants stand in the file under the hash of their bytes. Neither keeps the model's names, so a
parameter is known by its place: the third ``linear`` of the program is the third that the model runs.
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
        kind: ``linear``, ``gain`` (a vector, of a norm) or ``embedding``.
        weight: its values in float32, in the shape of the model's parameter.
        bias: the same of a linear's bias.
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
    """A parameter that the program holds itself and hands to an operator; ``None`` for any other value."""
    if not hasattr(value, "data_buffer_idx") or value.allocation_info is not None or not value.data_buffer_idx:
        return None
    kind, shape = {1: GAIN, 2: EMBEDDING}.get(len(value.sizes)), tuple(value.sizes)
    if kind is None or value.scalar_type.name != "FLOAT":  # a number, a table of the rotary embedding
        return None
    return Constant(kind, _floats(_storage(program, value), shape))


def _embedding(program: Any, codes: Any, scales: Any) -> Constant:
    """A rounded embedding ``(rows, columns)``: int8 codes and float32 scales for each row or group."""
    rows, columns = codes.sizes
    factors = _storage(program, scales)[: 4 * int(torch.Size(scales.sizes).numel())]
    return Constant(EMBEDDING, unpack(_storage(program, codes), factors, INT8, (rows, columns)))


def _storage(program: Any, value: Any) -> bytes:
    """A constant's bytes, and what pads them."""
    return bytes(program.constant_buffer[value.data_buffer_idx].storage)


def _floats(raw: bytes, shape: tuple[int, ...]) -> Tensor:
    """Padding behind the last value is left out."""
    count = int(torch.Size(shape).numel())
    return torch.frombuffer(bytearray(raw[: 4 * count]), dtype=torch.float32).reshape(shape)


def _delegate(blob: bytes, data: Mapping[str, bytes]) -> Iterator[Constant]:
    """The same for one graph of XNNPACK."""
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
    """A delegate's graph as the plain data that ``flatc`` makes of it."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as serializer
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = serializer.XNNHeader.from_bytes(blob[: serializer.XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with TemporaryDirectory() as folder:
        place = Path(folder)
        (place / SCHEMA).write_bytes(serializer._get_schema_bytes())
        (place / "graph.bin").write_bytes(blob[start : start + header.flatbuffer_size])
        _flatc_decompile(folder, str(place / SCHEMA), str(place / "graph.bin"), ["--raw-binary"])
        content: dict[str, Any] = json.loads((place / "graph.json").read_text())
    return content


def _value(value: Mapping[str, Any], graph: Mapping[str, Any], data: Mapping[str, bytes]) -> Tensor | None:
    """A value that is constant, dequantized; ``None`` for one that is computed."""
    tensor = value.get("tensor_value", value)
    if not tensor["constant_buffer_idx"]:
        return None
    raw, shape = _bytes(graph, tensor["constant_buffer_idx"], data), tuple(tensor["dims"])
    if "quant_params" not in value:
        if tensor["datatype"] != _FLOAT:
            raise ValueError(f"a constant is stored as {tensor['datatype']}")
        return _floats(raw, shape)
    scales = _bytes(graph, value["quant_params"]["scale_buffer_idx"], data)
    return unpack(raw, scales, tensor["datatype"].removeprefix(_PREFIX), (shape[0], shape[1]))


def _bytes(graph: Mapping[str, Any], index: int, data: Mapping[str, bytes]) -> bytes:
    entry = graph["constant_data"][index]
    return data[entry["named_key"]][: entry["size"]]
