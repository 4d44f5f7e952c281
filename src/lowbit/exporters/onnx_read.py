"""Reads every parameter of a ``model.onnx`` back through the ``onnx`` package, under the model's own names.

The builder stores float matrices of linears transposed, and a matrix that embedding and head share once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.exporters import onnx_ops, onnx_qdq
from lowbit.exporters.hf_folder import embedding_of
from lowbit.exporters.onnx_names import renamed, split_or_fuse
from lowbit.exporters.run import Run
from lowbit.models.runtime_ops import parse_tensor_name

GRAPH, SETTINGS = "model.onnx", "genai_config.json"
TABLES = re.compile(r"(cos|sin)_cache|/.*")  # of the rotary embedding; constants
HEAD = "lm_head.MatMul.weight"


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes ``(rows, n * 8 / bits)`` from bytes ``(rows, n)``, low bits first.

    >>> unpack(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4).tolist()
    [[1, 2, 3, 4]]
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (packed[..., None] >> shifts & 2**bits - 1).flatten(-2)


def accuracy_level(model: Any) -> int | None:
    """The ``accuracy_level`` that all MatMulNBits of a graph share; ``None`` if there are none."""
    levels = {attributes["accuracy_level"] for _, attributes in _nodes(model)}
    if len(levels) > 1:
        raise LowbitError(f"{GRAPH} mixes accuracy levels {sorted(levels)}")
    return int(levels.pop()) if levels else None


def load_graph(path: Path) -> Any:
    """The ``onnx.ModelProto`` of a folder, without the content of its data file."""
    import onnx

    return onnx.load(path / GRAPH, load_external_data=False)


def _nodes(model: Any) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Inputs and attributes of every MatMulNBits."""
    from onnx.helper import get_attribute_value

    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            yield list(node.input), {a.name: get_attribute_value(a) for a in node.attribute}


def read(run: Run, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model in float32, one linear in memory at a time."""
    from onnx.numpy_helper import to_array

    model = load_graph(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def value(name: str) -> Tensor:
        return torch.tensor(to_array(stored[name], str(path)))

    seen: set[str] = set()
    waiting: dict[str, Tensor] = {}
    for inputs, attributes in _nodes(model):
        seen |= set(inputs)
        name = renamed(inputs[1].replace(".MatMulNBits.qweight", ".weight"))
        yield from split_or_fuse(run, name, _dequantized([value(n) for n in inputs[1:]], attributes), waiting)
    for linear in onnx_qdq.linears(model):
        seen |= linear.initializers
        for key, part in onnx_qdq.values(linear, str(path)):
            yield from split_or_fuse(run, f"{linear.name.removesuffix('.weight')}.{key}", part, waiting)
    yield from onnx_ops.read(run, model, value)
    for name in stored:
        if name in seen or TABLES.fullmatch(name) or parse_tensor_name(name) is not None:
            continue
        content = value(name).float()
        if name == HEAD and f"{embedding_of(run.subject.config)}.weight" not in stored:
            yield f"{embedding_of(run.subject.config)}.weight", content.T.contiguous()
        else:
            content = content.T.contiguous() if name.endswith(onnx_qdq.WEIGHT) else content
            yield from split_or_fuse(run, renamed(name), content, waiting)
    yield from waiting.items()


def _dequantized(tensors: list[Tensor], attributes: dict[str, Any]) -> Tensor:
    """``(N, K)`` of ``B (N, blocks, bytes)``, ``scales`` and, where they are not the default, ``zero_points``."""
    bits, rows, columns = attributes["bits"], attributes["N"], attributes["K"]
    packed, scales, *zeros = tensors
    codes = unpack(packed.reshape(rows, -1, packed.shape[-1]), bits).float()
    blocks = codes.shape[1]
    zero = torch.full((rows, blocks), 2.0 ** (bits - 1))
    if zeros:
        zero = unpack(zeros[0].reshape(rows, -1), bits)[:, :blocks].float()
    return ((codes - zero[..., None]) * scales.reshape(rows, blocks, 1)).flatten(1)[:, :columns].contiguous()
