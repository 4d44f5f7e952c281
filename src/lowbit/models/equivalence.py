"""Equivalent transforms: an invertible map folded across an edge of a block keeps the block's float function.

The contract, tested for every edge of every family: ``run(block, x, move(block, edge, t)) == run(block, x)``.
Activations are rows ``x``; a map ``A`` turns them into ``x A^-1``, and a weight ``W`` ``(out, in)`` that reads them
into ``W A^T`` (AffineQuant, arXiv 2403.12544, section 3). The same code serves fitting and merging: it is
differentiable in the map and leaves the block's own parameters untouched.

========== =============================== ===========================================================
edge       shape of ``map``                meaning
========== =============================== ===========================================================
norm       ``(width,)``                    the diagonal of A
heads      ``(kv, dim)``                   one diagonal per KV head
heads      ``(kv, dim, dim)``              one matrix A per KV head, shared by its query heads
channels   ``(width,)``                    the diagonal of A
qk         ``(kv, rotary / 2)``            rotary: one scale per pair of dimensions
qk         ``(kv, rotary / 2, 2)``         rotary: ``(a, b)`` of the scaled rotation ``[[a, -b], [b, a]]``
qk         ``(rotary / 2,)``               rotary, norms on q and k: one scale per pair, shared by heads
qk         ``(kv, dim)``, ``(kv, dim, dim)`` no rotary embedding: a diagonal or a matrix per head
========== =============================== ===========================================================

For qk, K becomes ``K C^T`` and Q ``Q C^-1``. A dense matrix after a norm cannot be folded and is refused here.

Norm and heads edges also take a shift ``s``: activations become ``(x - s) A^-1``, at no run-time cost where both ends
have a bias (``can_shift``). Across heads this is exact because the rows of the softmax sum to 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.models.architecture import Edge, Heads, Norm, Projection
from lowbit.models.block import Block

Params = dict[str, Tensor]


def move(
    block: Block,
    edge: Edge,
    map: Tensor,
    params: Mapping[str, Tensor] | None = None,
    shift: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Params:
    """The block's parameters with ``map`` folded across ``edge``.

    Args:
        block: the block that has the edge; its parameters are the start unless ``params`` is given.
        edge: one of ``block.edges()``.
        map: see the table above; it must be invertible.
        params: parameters to start from, for several transforms in sequence.
        shift: subtracted from the activations before the map: ``(width,)`` for a norm, ``(kv, dim)`` for heads.
        inverse: the inverse of a matrix ``map``, if already computed.

    Raises:
        LowbitError: the map's shape does not fit the edge, the edge cannot take a shift, or a runtime op follows the
            norm, so that ``dst`` does not read the norm's own output.

    Example: for a norm with gain 2, a linear with weight 3 and the map 4, the gain becomes 0.5 and the weight 12;
    their product stays 6.
    """
    out: Params = dict(block.params if params is None else params)
    check_can_move(block, edge)
    if shift is not None:
        _shift(block, out, edge, shift)
    if edge.kind == "norm":
        _norm(block, out, edge, map)
    elif edge.kind == "channels":
        _channels(block, out, edge, map)
    elif edge.kind == "heads":
        _heads(block, out, edge, map, inverse)
    elif block.heads.rotary == 0:
        _qk_without_rotary(block, out, edge, map, inverse)
    else:
        _qk_rotary(block, out, edge, map)
    return out


def can_move(block: Block, edge: Edge) -> bool:
    """Whether a map can be folded across the edge: no runtime op is between a norm and its readers."""
    return edge.kind != "norm" or edge.src.module not in block.ops


def check_can_move(block: Block, edge: Edge) -> None:
    """Refuse to fold a map across a norm that a runtime op follows.

    Raises:
        LowbitError: a runtime op follows the norm.
    """
    if not can_move(block, edge):
        raise LowbitError(
            f"a {block.ops[edge.src.module].kind} follows the norm {edge.src.module}: no transform can be folded "
            "across it; put the step that folds before the step that leaves the runtime op"
        )


def can_shift(block: Block, edge: Edge) -> bool:
    """Whether a shift can be folded across the edge: norm and heads edges whose ends all have a bias."""
    return edge.kind in ("norm", "heads") and all(end.bias in block.params for end in (edge.src, *edge.dst))


def map_width(block: Block, edge: Edge) -> int:
    """Number of channels of a diagonal map across the edge (for ``heads``: all KV heads together)."""
    return edge.width if isinstance(edge.src, Projection) else block.params[edge.src.parameter].shape[0]


def _expect(edge: Edge, map: Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(map.shape) not in shapes:
        allowed = " or ".join(str(shape) for shape in shapes)
        extra = "; a dense matrix after a norm cannot be folded" if edge.kind == "norm" and map.ndim == 2 else ""
        raise LowbitError(f"a map of shape {tuple(map.shape)} for the {edge.kind} edge: expected {allowed}{extra}")


def _shift(block: Block, out: Params, edge: Edge, shift: Tensor) -> None:
    """Subtract ``shift`` from the source's bias and add its image to the readers' biases: ``b + W s``."""
    if not can_shift(block, edge):
        raise LowbitError(f"a shift across the {edge.kind} edge from {edge.src.module}: both ends need a bias")
    spread = shift
    if edge.kind == "heads":
        spread = shift.repeat_interleave(block.heads.group, 0).flatten()
    for dst in edge.readers:
        image = dst.read(out) @ spread
        dst.change_bias(out, lambda bias, image=image: bias + image)  # type: ignore[misc]
    if isinstance(edge.src, Norm):
        out[edge.src.bias] = out[edge.src.bias] - shift
    else:
        edge.src.change_bias(out, lambda bias: bias - shift.flatten())


def _norm(block: Block, out: Params, edge: Edge, map: Tensor) -> None:
    src = edge.src
    gain = out[src.parameter]
    _expect(edge, map, tuple(gain.shape))
    offset = block.family.norm_offset
    out[src.parameter] = (gain + offset) / map - offset
    if src.bias in out:
        out[src.bias] = out[src.bias] / map
    for dst in edge.readers:
        dst.change_weight(out, lambda weight: weight * map)


def _channels(block: Block, out: Params, edge: Edge, map: Tensor) -> None:
    _expect(edge, map, (map_width(block, edge),))
    assert isinstance(edge.src, Projection)
    edge.src.change(out, lambda rows: rows / _as_rows(map, rows))
    for dst in edge.readers:
        dst.change_weight(out, lambda weight: weight * map)


def _heads(block: Block, out: Params, edge: Edge, map: Tensor, inverse: Tensor | None) -> None:
    heads = block.heads
    _expect(edge, map, (heads.kv, heads.dim), (heads.kv, heads.dim, heads.dim))
    assert isinstance(edge.src, Projection)
    # Query head h reads KV head h // group.
    spread = map.repeat_interleave(heads.group, 0)
    if map.ndim == 2:
        edge.src.change(out, lambda rows: rows / _as_rows(map.flatten(), rows))
        for dst in edge.readers:
            dst.change_weight(out, lambda weight: weight * spread.flatten())
        return
    inverse_map = torch.linalg.inv(map) if inverse is None else inverse
    # V becomes V A^-1 per head; on the rows of the weight this is A^-T W_v.
    edge.src.change(out, lambda rows: _per_head(inverse_map.mT, rows, heads.kv))

    def transform_columns(weight: Tensor) -> Tensor:
        columns = weight.unflatten(-1, (heads.query, heads.dim))  # (out, query, dim)
        return torch.einsum("ohd,hed->ohe", columns, spread).flatten(-2)

    for dst in edge.readers:
        dst.change_weight(out, transform_columns)


def _qk_without_rotary(block: Block, out: Params, edge: Edge, map: Tensor, inverse: Tensor | None) -> None:
    """Without a rotary embedding: any matrix per KV head."""
    heads = block.heads
    _expect(edge, map, (heads.kv, heads.dim), (heads.kv, heads.dim, heads.dim))
    if map.ndim == 2:
        map, inverse = torch.diag_embed(map), torch.diag_embed(1 / map)
    _apply_qk(block, out, edge, map, inverse)


def _qk_rotary(block: Block, out: Params, edge: Edge, map: Tensor) -> None:
    """Under a rotary embedding: a scaled rotation of each pair, which commutes with it."""
    heads, pairs = block.heads, block.heads.rotary // 2
    if block.family.qk_norm_per_head:
        _expect(edge, map, (pairs,))
        scale = torch.cat([map, map, map.new_ones(heads.dim - heads.rotary)])
        offset = block.family.norm_offset
        q, k = edge.src.parameter, edge.dst[0].parameter
        out[q] = (out[q] + offset) / scale - offset
        out[k] = (out[k] + offset) * scale - offset
        return
    _expect(edge, map, (heads.kv, pairs), (heads.kv, pairs, 2))
    a, b = (map, torch.zeros_like(map)) if map.ndim == 2 else map.unbind(-1)
    size = a.square() + b.square()
    # The inverse of a scaled rotation is a scaled rotation.
    _apply_qk(block, out, edge, _rotary_matrix(a, b, heads), _rotary_matrix(a / size, -b / size, heads))


def _rotary_matrix(a: Tensor, b: Tensor, heads: Heads) -> Tensor:
    """``(kv, dim, dim)`` from the pairs' ``a`` and ``b`` ``(kv, pairs)``; identity on unrotated dimensions."""
    unrotated = heads.dim - heads.rotary
    ones = a.new_ones(a.shape[0], unrotated)
    blocks = [
        torch.cat([torch.diag_embed(a), torch.diag_embed(-b)], -1),
        torch.cat([torch.diag_embed(b), torch.diag_embed(a)], -1),
    ]
    rotation = torch.nn.functional.pad(torch.cat(blocks, -2), (0, unrotated, 0, unrotated))
    return rotation + torch.diag_embed(torch.cat([torch.zeros_like(a), torch.zeros_like(a), ones], -1))


def _apply_qk(block: Block, out: Params, edge: Edge, c: Tensor, inverse: Tensor | None) -> None:
    """Multiply K rows by C and Q rows by C^-T; ``c`` is ``(kv, dim, dim)``."""
    heads = block.heads
    for dst in edge.readers:
        dst.change(out, lambda rows: _per_head(c, rows, heads.kv))
    inverse_t = (torch.linalg.inv(c) if inverse is None else inverse).mT.repeat_interleave(heads.group, 0)
    assert isinstance(edge.src, Projection)
    edge.src.change(out, lambda rows: _per_head(inverse_t, rows, heads.query))


def _per_head(matrix: Tensor, rows: Tensor, count: int) -> Tensor:
    """``matrix`` ``(count, dim, dim)`` applied to the rows ``(count * dim, ...)`` of a weight or bias."""
    split = rows.unflatten(0, (count, -1))
    return torch.einsum("hde,he...->hd...", matrix, split).flatten(0, 1)


def _as_rows(map: Tensor, rows: Tensor) -> Tensor:
    """A factor per row, shaped to broadcast over the rows of a weight or bias."""
    return map.reshape(-1, *[1] * (rows.ndim - 1))
