"""Equivalent transforms: an invertible map folded across an edge of a block keeps the block's float function.

The contract, tested for every edge of every family: ``run(block, x, move(block, edge, t)) == run(block, x)``.
Activations are rows ``x``; a map ``A`` turns them into ``x A^-1``, and a weight ``W`` ``(out, in)`` that reads them
into ``W A^T`` (AffineQuant, arXiv 2403.12544, section 3). The same code serves fitting and merging: it is
differentiable in the map and leaves the block's own parameters untouched.

========== ================================= ===========================================================
edge       shape of ``map``                  meaning
========== ================================= ===========================================================
norm       ``(width,)``                      the diagonal of A
heads      ``(kv, dim)``                     one diagonal per KV head
heads      ``(kv, dim, dim)``                one matrix A per KV head, shared by its query heads
channels   ``(width,)``                      the diagonal of A
qk         ``(kv, pairs)``                   rotated pairs: one scale each
qk         ``(kv, pairs, 2)``                rotated pairs: ``(a, b)`` of the scaled rotation ``[[a, -b], [b, a]]``
qk         ``(kv, free)``, ``(kv, free, free)`` free dimensions: a diagonal or a matrix per head
qk         ``(size,)``                       norms with gains that heads share: one scale per pair or free dimension
qk         ``(kv, size)``                    norms over all heads: the same per KV head
========== ================================= ===========================================================

``limit`` of the edge says which of them fold. For qk, K becomes ``K C^T`` and Q ``Q C^-1``. A dense matrix after a
norm cannot be folded and is refused here. Where a channels edge has ``power`` p, rows of its source take the p-th
root.

A prefix's keys and values (``prefix.py``) change with the rows of k and v.

Norm and heads edges also take a shift ``s``: activations become ``(x - s) A^-1``, at no run-time cost where both ends
have a bias (``can_shift``). Across heads this is exact where the rows of the softmax sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.models.block import Block
from lowbit.models.edges import Edge, Norm, Projection
from lowbit.models.prefix import KEYS, VALUES, change_cached
from lowbit.models.runtime_ops import at_input, linear_behind

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
        LowbitError: the map's shape does not fit the edge, the edge cannot take a shift, or a runtime op is between
            the two ends, so that ``dst`` does not read the channels of ``src``.

    Example: for a norm with gain 2, a linear with weight 3 and the map 4, the gain becomes 0.5 and the weight 12;
    their product stays 6.
    """
    out: Params = dict(block.params if params is None else params)
    check_can_move(block, edge)
    if shift is not None:
        _shift(block, out, edge, shift)
    if edge.kind == "norm":
        _norm(out, edge, map)
    elif edge.kind == "channels":
        _channels(out, edge, map)
    elif edge.kind == "heads":
        _heads(out, edge, map, inverse)
    elif edge.gains:
        _qk_gains(out, edge, map)
    elif edge.pairs:
        _qk_pairs(out, edge, map)
    else:
        _qk_free(out, edge, map, inverse)
    return out


def op_between(block: Block, edge: Edge) -> str | None:
    """The name of a runtime op that is between the source's channels and those that a reader reads, if one is."""
    if edge.kind == "norm" and edge.src.module in block.ops:
        return edge.src.module
    inputs = (at_input(dst.module) for dst in edge.readers) if edge.kind != "qk" else ()
    return next((name for name in inputs if name in block.ops), None)


def can_move(block: Block, edge: Edge) -> bool:
    """Whether a map can be folded across the edge: no runtime op is between its two ends."""
    return op_between(block, edge) is None


def check_can_move(block: Block, edge: Edge) -> None:
    """Refuse to fold a map across a runtime op.

    Raises:
        LowbitError: a runtime op follows the norm, or is on a reader's input.
    """
    if (name := op_between(block, edge)) is not None:
        where = "follows the norm" if name == edge.src.module else "is on the input of"
        raise LowbitError(
            f"a {block.ops[name].kind} {where} {linear_behind(name) or name}: no transform can be folded "
            "across it; put the step that folds before the step that leaves the runtime op"
        )


def can_shift(block: Block, edge: Edge) -> bool:
    """Whether a shift can be folded across the edge: it takes one, and all its ends have a bias."""
    return edge.shift and all(end.bias in block.params for end in (edge.src, *edge.dst))


def _expect(edge: Edge, map: Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(map.shape) not in shapes:
        allowed = " or ".join(str(shape) for shape in shapes)
        extra = "; a dense matrix after a norm cannot be folded" if edge.kind == "norm" and map.ndim == 2 else ""
        raise LowbitError(f"a map of shape {tuple(map.shape)} for the {edge.kind} edge: expected {allowed}{extra}")


def _shift(block: Block, out: Params, edge: Edge, shift: Tensor) -> None:
    """Subtract ``shift`` from the source's bias and add its image to the readers' biases: ``b + W s``."""
    if not can_shift(block, edge):
        raise LowbitError(f"a shift across the {edge.kind} edge from {edge.src.module}: both ends need a bias")
    spread = edge.spread(shift.flatten())
    for dst in edge.readers:
        image = dst.read(out) @ spread
        dst.change_bias(out, lambda bias, image=image: bias + image)  # type: ignore[misc]
    if isinstance(edge.src, Norm):
        out[edge.src.bias] = out[edge.src.bias] - shift
    else:
        edge.src.change_bias(out, lambda bias: bias - shift.flatten())
        if edge.kind == "heads":
            change_cached(out, VALUES, edge, lambda rows: rows - shift.flatten()[:, None])


def _norm(out: Params, edge: Edge, map: Tensor) -> None:
    _expect(edge, map, (edge.width,))
    out[edge.src.parameter] = (out[edge.src.parameter] + edge.offset) / map - edge.offset
    if edge.src.bias in out:
        out[edge.src.bias] = out[edge.src.bias] / map
    spread = edge.spread(map)
    for dst in edge.readers:
        dst.change_weight(out, lambda weight: weight * spread)


def _channels(out: Params, edge: Edge, map: Tensor) -> None:
    _expect(edge, map, (edge.width,))
    assert isinstance(edge.src, Projection)
    divisor = map if edge.power == 1 else map.pow(1 / edge.power)
    edge.src.change(out, lambda rows: rows / _as_rows(divisor, rows))
    spread = edge.spread(map)
    for dst in edge.readers:
        dst.change_weight(out, lambda weight: weight * spread)


def _heads(out: Params, edge: Edge, map: Tensor, inverse: Tensor | None) -> None:
    heads = edge.layout
    _expect(edge, map, *_per_head_shapes(edge))
    assert isinstance(edge.src, Projection)
    # Query head h reads KV head h // group.
    spread = map.repeat_interleave(heads.group, 0)
    if map.ndim == 2:
        _change_v(out, edge, lambda rows: rows / _as_rows(map.flatten(), rows))
        for dst in edge.readers:
            dst.change_weight(out, lambda weight: weight * spread.flatten())
        return
    inverse_map = torch.linalg.inv(map) if inverse is None else inverse
    # V becomes V A^-1 per head; on the rows of the weight this is A^-T W_v.
    _change_v(out, edge, lambda rows: _per_head(inverse_map.mT, rows, heads.kv))

    def transform_columns(weight: Tensor) -> Tensor:
        columns = weight.unflatten(-1, (heads.query, heads.dim))  # (out, query, dim)
        return torch.einsum("ohd,hed->ohe", columns, spread).flatten(-2)

    for dst in edge.readers:
        dst.change_weight(out, transform_columns)


def _change_v(out: Params, edge: Edge, by: Callable[[Tensor], Tensor]) -> None:
    """Change the rows of v, and a prefix's values with them."""
    assert isinstance(edge.src, Projection)
    edge.src.change(out, by)
    change_cached(out, VALUES, edge, by)


def _per_head_shapes(edge: Edge) -> list[tuple[int, ...]]:
    """A diagonal for each head and, where it folds, a matrix."""
    shape = edge.diagonal_shape
    return [shape, (*shape, shape[-1])] if edge.limit in ("matrix", "rotation") else [shape]


def _qk_gains(out: Params, edge: Edge, map: Tensor) -> None:
    """Norms on q and k: their gains take one factor for each pair, or for each free dimension."""
    _expect(edge, map, edge.diagonal_shape)
    first, second = zip(*edge.pairs, strict=True) if edge.pairs else (edge.free, ())
    dims = torch.tensor([*first, *second], device=map.device)
    ones = map.new_ones(*map.shape[:-1], edge.layout.dim)
    scale = ones.index_copy(-1, dims, torch.cat([map, map], -1) if second else map)
    q_scale = scale if edge.shared else edge.spread(scale.flatten())
    q, k = edge.src, edge.dst[0]
    out[q.parameter] = (out[q.parameter] + edge.offset) / q_scale - edge.offset
    out[k.parameter] = (out[k.parameter] + edge.offset) * scale.flatten() - edge.offset
    if q.bias in out:
        out[q.bias] = out[q.bias] / q_scale
    if k.bias in out:
        out[k.bias] = out[k.bias] * scale.flatten()
    every = scale.expand(edge.layout.kv, -1).flatten()
    change_cached(out, KEYS, edge, lambda rows: rows * every[:, None])


def _qk_free(out: Params, edge: Edge, map: Tensor, inverse: Tensor | None) -> None:
    """Dimensions without a rotary embedding: any matrix per KV head."""
    _expect(edge, map, *_per_head_shapes(edge))
    if map.ndim == 2:
        map, inverse = torch.diag_embed(map), torch.diag_embed(1 / map)
    inverse = torch.linalg.inv(map) if inverse is None else inverse
    _apply_qk(out, edge, _embedded(edge, map), _embedded(edge, inverse))


def _embedded(edge: Edge, matrix: Tensor) -> Tensor:
    """``(kv, free, free)`` as ``(kv, dim, dim)``, the identity on other dimensions."""
    dim = edge.layout.dim
    if edge.free == tuple(range(dim)):
        return matrix
    free = torch.tensor(edge.free, device=matrix.device)
    places = (free[:, None] * dim + free).flatten()
    eye = torch.eye(dim, dtype=matrix.dtype, device=matrix.device).flatten().expand(len(matrix), -1)
    return eye.index_copy(1, places, matrix.flatten(1)).unflatten(1, (dim, dim))


def _qk_pairs(out: Params, edge: Edge, map: Tensor) -> None:
    """Under a rotary embedding: a scaled rotation of each pair, which commutes with it."""
    shape = edge.diagonal_shape
    rotations = [(*shape, 2)] if edge.limit in ("matrix", "rotation") else []
    _expect(edge, map, shape, *rotations)
    a, b = (map, torch.zeros_like(map)) if map.ndim == 2 else map.unbind(-1)
    size = a.square() + b.square()
    # The inverse of a scaled rotation is a scaled rotation.
    _apply_qk(out, edge, _rotations(edge, a, b), _rotations(edge, a / size, -b / size))


def _rotations(edge: Edge, a: Tensor, b: Tensor) -> Tensor:
    """``(kv, dim, dim)`` from the pairs' ``a`` and ``b`` ``(kv, pairs)``; identity on other dimensions."""
    others = edge.layout.dim - 2 * a.shape[1]
    blocks = [
        torch.cat([torch.diag_embed(a), torch.diag_embed(-b)], -1),
        torch.cat([torch.diag_embed(b), torch.diag_embed(a)], -1),
    ]
    rotation = torch.nn.functional.pad(torch.cat(blocks, -2), (0, others, 0, others))
    ones = a.new_ones(a.shape[0], others)
    rotation = rotation + torch.diag_embed(torch.cat([torch.zeros_like(a), torch.zeros_like(a), ones], -1))
    # So far the first dimensions of all pairs stand in front, then the second ones, then the rest.
    order = [dim for side in zip(*edge.pairs, strict=True) for dim in side]
    order += [dim for dim in range(edge.layout.dim) if dim not in order]
    if order == list(range(edge.layout.dim)):
        return rotation
    places = _places(tuple(order), a.device)
    return rotation[:, places][:, :, places]


@cache
def _places(order: tuple[int, ...], device: torch.device) -> Tensor:
    """The inverse of an order; kept, since a copy to a device would make the host wait at every step."""
    return torch.tensor(order, device=device).argsort()


def _apply_qk(out: Params, edge: Edge, c: Tensor, inverse: Tensor) -> None:
    """Multiply K rows by C and Q rows by C^-T; ``c`` and ``inverse`` are ``(kv, dim, dim)``."""
    heads = edge.layout
    for dst in edge.readers:
        dst.change(out, lambda rows: _per_head(c, rows, heads.kv))
    change_cached(out, KEYS, edge, lambda rows: _per_head(c, rows, heads.kv))
    inverse_t = inverse.mT.repeat_interleave(heads.group, 0)
    assert isinstance(edge.src, Projection)
    edge.src.change(out, lambda rows: _per_head(inverse_t, rows, heads.query))


def _per_head(matrix: Tensor, rows: Tensor, count: int) -> Tensor:
    """``matrix`` ``(count, dim, dim)`` applied to the rows ``(count * dim, ...)`` of a weight or bias."""
    split = rows.unflatten(0, (count, -1))
    return torch.einsum("hde,he...->hd...", matrix, split).flatten(0, 1)


def _as_rows(map: Tensor, rows: Tensor) -> Tensor:
    """A factor per row, shaped to broadcast over the rows of a weight or bias."""
    return map.reshape(-1, *[1] * (rows.ndim - 1))
