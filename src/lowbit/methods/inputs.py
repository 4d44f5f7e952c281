"""The inputs that linears read: statistics and factorisations are shared by linears that read the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


HELD = 1 << 30  # bytes of second moments held at once, where one pass over the data could collect more


def stages(block: Block, matrices: int = 1) -> Iterator[list[tuple[str, ...]]]:
    """``input_groups``, with those together whose inputs do not depend on each other: one pass observes them all.

    Those are the experts of a layer, first what reads its hidden states, then what is behind that. No more of them
    come together than ``HELD`` bytes of second moments allow, with ``matrices`` for each input.
    """
    stage: list[tuple[str, ...]] = []
    for group in input_groups(block):
        if stage and _stage_of(block, group[0]) != _stage_of(block, stage[0][0]):
            yield from held_together(block, stage, matrices)
            stage = []
        stage.append(group)
    if stage:
        yield from held_together(block, stage, matrices)


def _stage_of(block: Block, linear: str) -> tuple[str, str]:
    """What a linear and others that may be observed with it have in common."""
    index, _, name = linear.partition(".")
    return index, block.kind_of(linear).stage_of(name)


def held_together(
    block: Block, groups: Sequence[tuple[str, ...]], matrices: int = 1
) -> Iterator[list[tuple[str, ...]]]:
    """The groups in parts, as many in one as ``HELD`` bytes of second moments allow; at least one."""
    part: list[tuple[str, ...]] = []
    held = 0
    for group in groups:
        size = 4 * matrices * block.weight(group[0]).shape[1] ** 2
        if part and held + size > HELD:
            yield part
            part, held = [], 0
        part.append(group)
        held += size
    if part:
        yield part


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
