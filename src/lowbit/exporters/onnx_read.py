"""Reads every parameter of a ``model.onnx`` back through the ``onnx`` package, under the model's own names.

The builder packs q, k and v into one MatMulNBits and splits Phi-3's fused gate and up; both are undone here. It
stores the head transposed, and a matrix that embedding and head share once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.exporters.hf_folder import embedding_of
from lowbit.exporters.run import Run
from lowbit.models.families import architecture_of

GRAPH = "model.onnx"
TABLES = re.compile(r"(cos|sin)_cache|/.*")  # of the rotary embedding; constants
HEAD = "lm_head.MatMul.weight"
# Parts of names: the builder's, the model's.
RENAMED = (
    (r"\.attn\.", ".self_attn."),
    (r"\.(MatMul|Add)\.(weight|bias)$", r".\2"),
    (r"([qk]_norm)\.layernorm\.", r"\1."),
    (r"layers\.\d+\.final_norm_layernorm\.", "norm."),
)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes ``(rows, n * 8 / bits)`` from bytes ``(rows, n)``, low bits first.

    >>> unpack(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4).tolist()
    [[1, 2, 3, 4]]
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (packed[..., None] >> shifts & 2**bits - 1).flatten(-2)


def accuracy_level(path: Path) -> int:
    """The ``accuracy_level`` that all MatMulNBits of a graph share."""
    levels = {attributes["accuracy_level"] for _, attributes in _nodes(_load(path))}
    if len(levels) != 1:
        raise LowbitError(f"{path / GRAPH} mixes accuracy levels {sorted(levels)}")
    return int(levels.pop())


def _load(path: Path) -> Any:
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

    model = _load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def value(name: str) -> Tensor:
        return torch.tensor(to_array(stored[name], str(path)))

    seen: set[str] = set()
    halves: dict[str, Tensor] = {}
    for inputs, attributes in _nodes(model):
        seen |= set(inputs)
        name = _renamed(inputs[1].replace(".MatMulNBits.qweight", ".weight"))
        yield from _split_or_fuse(run, name, _dequantized([value(n) for n in inputs[1:]], attributes), halves)
    for name in stored:
        if name in seen or TABLES.fullmatch(name):
            continue
        if name != HEAD:
            yield from _split_or_fuse(run, _renamed(name), value(name).float(), halves)
        elif f"{embedding_of(run.subject.config)}.weight" in stored:
            yield "lm_head.weight", value(name).T.contiguous()
        else:
            yield f"{embedding_of(run.subject.config)}.weight", value(name).T.contiguous()
    yield from halves.items()


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


def _renamed(name: str) -> str:
    """The model's name of a parameter that the graph stores as one tensor, too.

    >>> _renamed("model.layers.3.attn.o_proj.Add.bias")
    'model.layers.3.self_attn.o_proj.bias'
    >>> _renamed("model.layers.30.final_norm_layernorm.weight")
    'model.norm.weight'
    """
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _split_or_fuse(run: Run, name: str, value: Tensor, halves: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The run's parameters from one of the graph's; ``halves`` holds those that wait for their counterpart."""
    config = run.subject.config
    fused = any(module.endswith(".qkv_proj") for module in run.quantized)
    if ".qkv_proj." in name and not fused:
        edges = architecture_of(config).layers[0].edges
        heads = next(edge.heads for edge in edges if edge.kind == "heads" and edge.heads is not None)
        parts = value.split([heads.query * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim])
        for part, rows in zip("qkv", parts, strict=True):
            yield name.replace("qkv_proj", f"{part}_proj"), rows.contiguous()
    elif fused and re.search(r"\.(gate|up)_proj\.", name):
        halves[name] = value
        gate, up = (re.sub(r"(gate|up)_proj", f"{part}_proj", name) for part in ("gate", "up"))
        if gate in halves and up in halves:
            yield gate.replace("gate_proj", "gate_up_proj"), torch.cat([halves.pop(gate), halves.pop(up)])
    else:
        yield name, value
