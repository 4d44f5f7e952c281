"""Edges through attention's values: one map for each key/value head, on rows of v and columns of o.

A row of v touches one channel of the values, in the query heads that share its head; the columns that read it are
those of these heads. Where a norm without a gain stands on the values a row touches its whole head, and no scale
comes back: there only a rotation of the head can pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lowbit.models.architecture import DeclaredEdge, Heads, Ref
from lowbit.models.discovery.readers import Owners, selected, writing
from lowbit.models.discovery.response import Response
from lowbit.models.discovery.sites import Owner


def heads_edges(owner: Owner, response: Response, owners: Owners) -> list[DeclaredEdge]:
    """The edges from rows of a linear that attention sees as values, and as nothing else."""
    edges = []
    for (attention, role), touched in response.touched.items():
        if role != "v":
            continue
        others = [response.touched.get((attention, one)) for one in ("q", "k")]
        alone = touched.flatten(1).any(1)
        for other in others:
            alone = alone if other is None else alone & ~other.flatten(1).any(1)
        by_head = _by_head(touched, alone)
        edge = by_head and (_scaled(owner, response, by_head, owners) or _rotated(owner, response, by_head, owners))
        edges += [edge] if edge else []
    return edges


def _by_head(touched: Tensor, alone: Tensor) -> dict[tuple[int, ...], list[tuple[int, Tensor]]]:
    """Rows with the dimensions they touch, by the heads they touch; empty if these overlap."""
    found: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for row in alone.nonzero().flatten().tolist():
        heads = tuple(touched[row].any(1).nonzero().flatten().tolist())
        found.setdefault(heads, []).append((row, touched[row].any(0).nonzero().flatten()))
    numbers = [head for heads in found for head in heads]
    even = len({len(rows) for rows in found.values()}) == 1
    return dict(sorted(found.items())) if even and len(numbers) == len(set(numbers)) else {}


def _scaled(
    owner: Owner, response: Response, by_head: Mapping[tuple[int, ...], list[tuple[int, Tensor]]], owners: Owners
) -> DeclaredEdge | None:
    """The edge where every row touches one dimension and comes back in some columns."""
    rows: list[int] = []
    for own in by_head.values():
        dims = [dims.tolist() for _, dims in own]
        if any(len(one) != 1 for one in dims) or len({one[0] for one in dims}) != len(dims):
            return None
        rows += [row for row, dims in sorted(own, key=lambda pair: int(pair[1][0]))]
    if any(response.refuted[row] for row in rows):
        return None
    ends: list[Ref] = []
    group = 1
    for name, hit in response.hits.items():
        columns = _columns_by_head(hit[rows], len(by_head))
        if columns is None:
            return None
        if columns:
            ends.append(selected(name, columns, owners[name].columns))
            group = max(group, len(columns) // len(rows))
    if not ends:
        return None
    heads = Heads(len(by_head) * group, len(by_head), len(rows) // len(by_head))
    return DeclaredEdge("heads", writing(owner, rows, "v"), tuple(ends), heads=heads, limit="matrix")


def _columns_by_head(hit: Tensor, kv: int) -> list[int] | None:
    """Columns ordered by query head and dimension, from ``(rows, columns)`` hits of rows ordered by head."""
    columns = [one.nonzero().flatten().tolist() for one in hit]
    if len({len(one) for one in columns}) != 1 or bool((hit > 1).any() | (hit < 0).any()):
        return None
    dim = len(columns) // kv
    out: list[int] = []
    for head in range(kv):
        for reader in range(len(columns[0])):
            out += [columns[head * dim + d][reader] for d in range(dim)]
    return out


def _rotated(
    owner: Owner, response: Response, by_head: Mapping[tuple[int, ...], list[tuple[int, Tensor]]], owners: Owners
) -> DeclaredEdge | None:
    """The edge where every row touches all dimensions of one head; the proof decides whether a rotation passes."""
    dims = [len(dims) for own in by_head.values() for _, dims in own]
    dim = len(next(iter(by_head.values())))
    if set(dims) != {dim} or dim == 1:
        return None
    rows = [row for own in by_head.values() for row, _ in own]
    places = {response.refuted[row] for row in rows}
    name = places.pop().removeprefix("the input of ") if len(places) == 1 else ""
    if name not in owners or owners[name].columns % (dim * len(by_head)):
        return None
    heads = Heads(owners[name].columns // dim, len(by_head), dim)
    return DeclaredEdge("heads", writing(owner, rows, "v"), (name,), heads=heads, limit="rotation")
