"""A map folded across an edge, on a layer's parameters by name.

Activations ``y`` become ``M y``: rows of the source are multiplied by ``M``, columns of a reader by ``M^-1``. Between
queries and keys, keys become ``C k`` and queries ``C^-T q``, which leaves their products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.models.architecture import DeclaredEdge, Heads, Limit, Part, Ref, module_of
from lowbit.models.discovery.readers import Owners
from lowbit.models.discovery.sites import Owner

Params = dict[str, Tensor]


def draw(edge: DeclaredEdge, owners: Owners, limit: Limit, generator: torch.Generator) -> Tensor:
    """A random map of a group.

    Returns:
        ``(kv, dim, dim)`` for ``heads`` and for ``qk`` between linears; otherwise the diagonal ``(channels,)``,
        ``(experts, channels)`` where every expert has its own.
    """
    owner = owners[module_of(edge.src)]
    if edge.kind == "heads" or (edge.kind == "qk" and owner.kind != "norm"):
        assert edge.heads is not None
        return _matrices(edge, edge.heads, limit, generator)
    if edge.kind == "qk":
        assert edge.heads is not None
        keys = len(rows_of(edge.dst[0], owners[module_of(edge.dst[0])]))  # of a head's width if all heads share them
        return _pair_scales(edge, keys // edge.heads.dim, edge.heads.dim, generator).flatten()
    width = len(rows_of(edge.src, owner))
    own_map = owner.experts and edge.kind == "channels"
    return scales((owner.experts, width) if own_map else (width,), generator, limit == "positive")


def scales(shape: tuple[int, ...], generator: torch.Generator, positive: bool) -> Tensor:
    """Factors between 0.5 and 2 in size; of both signs unless ``positive``."""
    size = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return size if positive else size * signs


def _pair_scales(edge: DeclaredEdge, count: int, dim: int, generator: torch.Generator) -> Tensor:
    """``(count, dim)`` factors, equal within a pair."""
    out = scales((count, dim), generator, False)
    for first, second in edge.pairs:
        out[:, second] = out[:, first]
    return out


def _matrices(edge: DeclaredEdge, heads: Heads, limit: Limit, generator: torch.Generator) -> Tensor:
    if edge.kind == "qk" and limit != "matrix":
        return torch.diag_embed(_pair_scales(edge, heads.kv, heads.dim, generator))
    if limit in ("diagonal", "positive"):
        return torch.diag_embed(scales((heads.kv, heads.dim), generator, limit == "positive"))
    if edge.kind == "heads":
        return _dense(heads.kv, heads.dim, generator, limit == "rotation")
    out = torch.zeros(heads.kv, heads.dim, heads.dim, dtype=torch.float64)
    for first, second in edge.pairs:
        a, b = (torch.randn(heads.kv, generator=generator, dtype=torch.float64) + shift for shift in (1.5, 0.0))
        out[:, first, first], out[:, second, second] = a, a
        out[:, first, second], out[:, second, first] = -b, b
    free = torch.tensor(edge.free, dtype=torch.long)
    out[:, free[:, None], free[None]] = _dense(heads.kv, len(free), generator, False)
    return out


def _dense(count: int, dim: int, generator: torch.Generator, rotation: bool) -> Tensor:
    noise = torch.randn(count, dim, dim, generator=generator, dtype=torch.float64)
    if rotation:
        return torch.linalg.qr(noise).Q
    return torch.eye(dim, dtype=torch.float64) + 0.3 * noise / max(dim, 1) ** 0.5


def rows_of(end: Ref, owner: Owner) -> list[int]:
    """The output channels that an endpoint means."""
    chosen = end.rows if isinstance(end, Part) else None
    return list(range(owner.rows)) if chosen is None else list(chosen)


def columns_of(end: Ref, owner: Owner) -> list[int]:
    """The input channels that an endpoint means."""
    chosen = end.columns if isinstance(end, Part) else None
    return list(range(owner.columns)) if chosen is None else list(chosen)


def fold(
    edge: DeclaredEdge, owners: Owners, params: Mapping[str, Tensor], map: Tensor, source_only: bool = False
) -> Params:
    """``params`` with a map folded across an edge; unchanged parameters are the same tensors.

    Example: across a norm with gain 2 and its reader with weight 3 the map 4 makes the gain 8 and the weight 0.75.
    """
    out = dict(params)
    owner = owners[module_of(edge.src)]
    if edge.kind == "qk":
        return _fold_qk(edge, owners, out, map, source_only)
    if edge.kind == "norm":
        _gain(out, owner, edge.offset, map)
    elif map.ndim == 3 and edge.kind == "heads":
        _mix(out, owner, rows_of(edge.src, owner), map, side="rows")
    else:
        _scale(out, owner, rows_of(edge.src, owner), map, side="rows")
    for end in () if source_only else edge.dst:
        reader = owners[module_of(end)]
        columns = columns_of(end, reader)
        if edge.kind == "heads":
            inverse = torch.linalg.inv(map)
            _mix(out, reader, columns, _spread(inverse, len(columns)).mT, side="columns")
        else:
            _scale(out, reader, columns, map ** -float(edge.power) if edge.power != 1 else 1 / map, side="columns")
    return out


def _fold_qk(edge: DeclaredEdge, owners: Owners, out: Params, map: Tensor, source_only: bool) -> Params:
    (key_end,) = edge.dst
    query, key = owners[module_of(edge.src)], owners[module_of(key_end)]
    query_rows, key_rows = rows_of(edge.src, query), rows_of(key_end, key)
    if query.kind == "norm":
        assert edge.heads is not None
        spread = _spread(map.view(-1, edge.heads.dim), len(query_rows)).flatten()
        _gain(out, query, edge.offset, _placed(1 / spread, query_rows, query.rows))
        if not source_only:
            _gain(out, key, edge.offset, _placed(map, key_rows, key.rows))
        return out
    inverse = torch.linalg.inv(map).mT
    _mix(out, query, query_rows, _spread(inverse, len(query_rows)), side="rows")
    if not source_only:
        _mix(out, key, key_rows, map, side="rows")
    return out


def _spread(map: Tensor, channels: int) -> Tensor:
    """A map for each key/value head, repeated for the query heads that share it."""
    return map.repeat_interleave(channels // (map.shape[0] * map.shape[-1]), 0)


def _placed(factor: Tensor, index: list[int], width: int) -> Tensor:
    """Factors of some channels, 1 for the others."""
    whole = factor.new_ones(width)
    whole[index] = factor
    return whole


def _gain(out: Params, owner: Owner, offset: float, factor: Tensor) -> None:
    out[owner.weight] = (out[owner.weight] + offset) * factor - offset
    if owner.bias:
        out[owner.bias] = out[owner.bias] * factor


def axis_of(owner: Owner, side: str) -> int:
    """The dimension of a weight that counts its rows or its columns."""
    first = 1 if owner.experts else 0
    return first if (side == "rows") != owner.transposed else first + 1


def _scale(out: Params, owner: Owner, index: list[int], factor: Tensor, side: str) -> None:
    """Channels times ``(channels,)``, or ``(experts, channels)``; a bias belongs to the rows."""
    changed = out[owner.weight].clone()
    view = changed.movedim(axis_of(owner, side), -1)
    view[..., index] = view[..., index] * (factor.unsqueeze(1) if factor.ndim == 2 else factor)
    out[owner.weight] = changed
    if side == "rows" and owner.bias:
        bias = out[owner.bias].clone()
        bias[..., index] = bias[..., index] * factor
        out[owner.bias] = bias


def _mix(out: Params, owner: Owner, index: list[int], matrices: Tensor, side: str) -> None:
    """Channels, ordered by head, multiplied by a matrix for each head; a bias belongs to the rows."""
    names = [(owner.weight, axis_of(owner, side))]
    if side == "rows" and owner.bias:
        names.append((owner.bias, 0))
    for name, axis in names:
        changed = out[name].clone()
        view = changed.movedim(axis, 0)
        heads = view[index].unflatten(0, (len(matrices), -1))
        view[index] = torch.einsum("gij,gj...->gi...", matrices, heads).flatten(0, 1)
        out[name] = changed
