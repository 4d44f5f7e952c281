"""The rotation of values that a scheme with rotated heads has, folded into v and o: it costs nothing at run time."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbit.models.block import Block
from lowbit.models.edges import Edge, first_edges
from lowbit.models.equivalence import move
from lowbit.quant.rotated_kv import RotatedTokens
from lowbit.quant.walsh_hadamard import walsh_hadamard


def with_rotated_values(block: Block) -> Block:
    """A block in which every head of v, and of a prefix's values, is rotated by a Hadamard matrix; o takes it back.

    Its float function stays. Unchanged unless the scheme rotates heads; a layer where no matrix folds between v and o
    gets a note, and its values are quantized as they are.
    """
    if not isinstance(block.kv, RotatedTokens):
        return block
    params, done = dict(block.params), set[int]()
    for edge in first_edges(e for e in block.edges() if e.kind == "heads" and e.limit in ("matrix", "rotation")):
        map = _inverse_of_rotation(edge).to(params[edge.src.parameter])
        params = move(block, edge, map, params, inverse=map.mT)
        done.add(int(edge.src.module.partition(".")[0]))
    out = replace(block, params=params)
    for index, kind in zip(block.indices, block.kinds, strict=True):
        if kind.attention is not None and index not in done:
            text = "no matrix folds between v and o in this layer: its values are quantized without a rotation"
            out = out.with_notes("kv", text, layer=index)
    return out


def _inverse_of_rotation(edge: Edge) -> torch.Tensor:
    """``(kv, dim, dim)``: activations become ``x A^-1``, and ``A^-1`` is the transform's matrix."""
    heads = edge.layout
    matrix = walsh_hadamard(torch.eye(heads.dim, dtype=torch.float64))
    return matrix.mT.expand(heads.kv, -1, -1)
