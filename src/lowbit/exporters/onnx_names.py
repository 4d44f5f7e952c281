"""Names of the builder's graph and of the model, and rows that one has in one matrix and the other in several.

The builder packs q, k and v into one MatMulNBits, and takes apart what Phi-3 has fused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from lowbit.exporters.run import Run
from lowbit.models.families import architecture_of

# Parts of names: the builder's, the model's.
RENAMED = (
    (r"\.attn\.", ".self_attn."),
    (r"\.(MatMul|Add)\.(weight|bias)$", r".\2"),
    (r"([qk]_norm)\.layernorm\.", r"\1."),
    (r"layers\.\d+\.final_norm_layernorm\.", "norm."),
)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def renamed(name: str) -> str:
    """The model's name of a parameter that the graph stores as one tensor, too.

    >>> renamed("model.layers.3.attn.o_proj.Add.bias")
    'model.layers.3.self_attn.o_proj.bias'
    >>> renamed("model.layers.30.final_norm_layernorm.weight")
    'model.norm.weight'
    """
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def source_rows(run: Run, module: str) -> tuple[str, slice]:
    """The run's module, and those of its rows, that are the whole of a linear in a graph without packed ones."""
    for whole, parts in FUSED.items():
        for place, part in enumerate(parts):
            fused = re.sub(rf"\.{part}$", f".{whole}", module)
            if fused != module and fused in run.subject.shapes:
                sizes = _sizes(run, whole, fused)
                start = sum(sizes[:place])
                return fused, slice(start, start + sizes[place])
    return module, slice(None)


def linear_of(run: Run, node: Any, weights: Collection[str]) -> str | None:
    """The run's module whose product a node of a graph is, or a part of it; ``None`` for any other node.

    Args:
        run: the run.
        node: a node of a graph without packed linears, or a product that is no linear's, whose name no module has.
        weights: names of the graph's float or dequantized weights.
    """
    if node.op_type == "MatMulNBits":
        name = node.input[1].replace(".MatMulNBits.qweight", ".weight")
    elif node.op_type == "MatMul" and node.input[1] in weights:
        name = node.input[1]
    else:
        return None
    return source_rows(run, renamed(name).removesuffix(".weight"))[0]


def _sizes(run: Run, whole: str, module: str) -> list[int]:
    """Rows of the parts of a fused matrix, or of one that the graph has packed."""
    if whole == "qkv_proj":
        edges = architecture_of(run.subject.config).layers[0].edges
        heads = next(edge.heads for edge in edges if edge.kind == "heads" and edge.heads is not None)
        return [heads.query * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim]
    return [run.subject.shapes[module][0] // 2] * 2


def split_or_fuse(run: Run, name: str, value: Tensor, waiting: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The run's parameters from one of the graph's.

    Args:
        run: the run.
        name: the parameter, with the model's way of naming.
        value: its value.
        waiting: parts of a fused parameter, until the last one comes.
    """
    module, kind = name.rsplit(".", 1)
    for whole, parts in FUSED.items():
        if module.endswith(f".{whole}") and module not in run.subject.shapes:
            for part, rows in zip(parts, value.split(_sizes(run, whole, module)), strict=True):
                yield f"{module.removesuffix(whole)}{part}.{kind}", rows.contiguous()
            return
        for part in parts:
            prefix = module.removesuffix(part)
            if not module.endswith(f".{part}") or f"{prefix}{whole}" not in run.subject.shapes:
                continue
            if kind.startswith("input_"):  # one for all parts
                yield f"{prefix}{whole}.{kind}", value
                return
            waiting[name] = value
            names = [f"{prefix}{other}.{kind}" for other in parts]
            if all(other in waiting for other in names):
                yield f"{prefix}{whole}.{kind}", torch.cat([waiting.pop(other) for other in names])
            return
    yield name, value
