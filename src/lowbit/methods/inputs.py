"""The inputs that linears read: statistics and factorisations are shared by linears that read the same numbers."""

from __future__ import annotations

import torch

from lowbit.models.block import Block
from lowbit.models.runtime_ops import RuntimeOp


def input_groups(block: Block) -> list[tuple[str, ...]]:
    """Quantized linears in execution order, grouped by the quantized input that they read.

    Linears that share a tensor share a group if their inputs have one format and equal runtime ops before them: a
    linear whose neighbour has another input format, or stays float, reads other numbers than it.
    """
    groups: list[tuple[str, ...]] = []
    for readers in block.linear_groups():
        parts: list[list[str]] = []
        for name in (name for name in readers if name in block.formats):
            same = next((part for part in parts if _same_input(block, part[0], name)), None)
            if same is None:
                parts.append([name])
            else:
                same.append(name)
        groups += map(tuple, parts)
    return groups


def _same_input(block: Block, one: str, other: str) -> bool:
    return block.input_format(one) == block.input_format(other) and _equal(block.ops.get(one), block.ops.get(other))


def _equal(one: RuntimeOp | None, other: RuntimeOp | None) -> bool:
    if one is None or other is None:
        return one is other
    tensors = one.to_tensors(), other.to_tensors()
    return (
        type(one) is type(other)
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    )
