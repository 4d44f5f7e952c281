"""Edges between queries and keys: rows of both sides whose scales cancel in the scores.

Two dimensions of a head that a rotary embedding mixes are touched together by one row: they are a pair, and only a
scaled rotation of both passes. A dimension that a row touches alone is free. Channels that rows of either side tie
together are one component; its query rows times ``s`` and its key rows times ``1 / s`` must leave the layer's output.
The owner nearest to the attention goes first (a norm on queries before the linear in front of it); owners further
away are asked for the channels that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.models.architecture import DeclaredEdge, Heads, Limit
from lowbit.models.discovery.readers import Owners, writing
from lowbit.models.discovery.response import SCALE, Response
from lowbit.models.discovery.sites import Role

MOST_DIMS = 2  # of a head that a row touches: more is a norm over the head, not a rotary embedding
Channel = tuple[int, int]  # query head, dimension
Test = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Component:
    """Channels tied together, and the rows of the query side and of the key side that touch them."""

    channels: frozenset[Channel]
    queries: tuple[int, ...]
    keys: tuple[int, ...]


def qk_edges(
    responses: Mapping[str, Response], order: Sequence[str], owners: Owners, attention: int, heads: int, test: Test
) -> Iterator[DeclaredEdge | str]:
    """The edges of one attention, or why two owners have none.

    Args:
        responses: by owner.
        order: the owners in execution order.
        owners: by name.
        attention: which attention of the layer.
        heads: its number of query heads.
        test: whether factors by owner, ``(samples, channels)``, leave the layer's output, ``(samples,)``.
    """
    covered: set[Channel] = set()
    for source in reversed(order):
        queries = touching(responses[source], attention, "q", heads)
        for reader in reversed(order):
            keys = touching(responses[reader], attention, "k", heads)
            shared = (
                {c for own in queries.values() for c in own} & {c for own in keys.values() for c in own}
            ) - covered
            if not shared or (owners[source].kind == "norm") != (owners[reader].kind == "norm"):
                continue
            parts = components(_within(queries, shared), _within(keys, shared))
            passing = [
                part for part, good in zip(parts, _tested(parts, source, reader, owners, test), strict=True) if good
            ]
            if not passing:
                continue
            covered |= {channel for part in passing for channel in part.channels}
            attended = (heads, key_heads(responses, attention, heads))
            edge = _edge(passing, queries, owners, source, reader, attended)
            yield edge or f"qk {source} > {reader}: heads differ in their pairs"


def touching(response: Response, attention: int, role: Role, heads: int) -> dict[int, frozenset[Channel]]:
    """The channels that each row touches, of rows that touch one or two dimensions of a head and no other role."""
    touched = response.touched.get((attention, role))
    if touched is None:
        return {}
    alone = torch.ones(len(touched), dtype=torch.bool)
    for (index, other), value in response.touched.items():
        if index == attention and other != role:
            alone &= ~value.flatten(1).any(1)
    spread = touched.repeat_interleave(heads // touched.shape[1], 1)
    narrow = (spread.sum(2).amax(1) <= MOST_DIMS) & spread.flatten(1).any(1)
    return {
        row: frozenset((h, d) for h, d in spread[row].nonzero().tolist())
        for row in (alone & narrow).nonzero().flatten().tolist()
    }


def key_heads(responses: Mapping[str, Response], attention: int, heads: int) -> int:
    """Key heads of an attention, which repeats them for ``heads`` query heads: groups that rows of linears touch."""
    groups = [
        {tuple(row.any(1).nonzero().flatten().tolist()) for row in touched if bool(row.any())}
        for response in responses.values()
        if (touched := response.touched.get((attention, "k"))) is not None
    ]
    apart = [own for own in groups if sum(map(len, own)) == len({head for group in own for head in group})]
    counts = [len(own) for own in apart if len(own) > 1 and heads % len(own) == 0]
    return max(counts, default=1)


def _within(rows: Mapping[int, frozenset[Channel]], channels: set[Channel]) -> dict[int, frozenset[Channel]]:
    return {row: own for row, own in rows.items() if own <= channels}


def components(queries: Mapping[int, frozenset[Channel]], keys: Mapping[int, frozenset[Channel]]) -> list[Component]:
    """Channels joined by rows; those that only one side touches are left out.

    >>> found = components({0: frozenset({(0, 0)}), 1: frozenset({(1, 0)})}, {5: frozenset({(0, 0), (1, 0)})})
    >>> [(one.queries, one.keys) for one in found]
    [((0, 1), (5,))]
    """
    parent: dict[Channel, Channel] = {}

    def root(channel: Channel) -> Channel:
        parent.setdefault(channel, channel)
        while parent[channel] != channel:
            channel = parent[channel]
        return channel

    for own in (*queries.values(), *keys.values()):
        first = root(min(own))
        for other in own:
            parent[root(other)] = first
    groups: dict[Channel, set[Channel]] = {}
    for channel in list(parent):
        groups.setdefault(root(channel), set()).add(channel)
    found = []
    for channels in groups.values():
        sides = [tuple(sorted(row for row, own in side.items() if own & channels)) for side in (queries, keys)]
        if all(
            {c for row in rows for c in side[row]} >= channels
            for rows, side in zip(sides, (queries, keys), strict=True)
        ):
            found.append(Component(frozenset(channels), *sides))
    return sorted(found, key=lambda part: min(part.channels))


def _tested(parts: Sequence[Component], source: str, reader: str, owners: Owners, test: Test) -> list[bool]:
    if not parts:
        return []
    factors = {name: torch.ones(len(parts), owners[name].rows, dtype=torch.float64) for name in (source, reader)}
    for sample, part in enumerate(parts):
        factors[source][sample, list(part.queries)] *= SCALE
        factors[reader][sample, list(part.keys)] /= SCALE
    return [bool(good) for good in test(factors)]


def _edge(
    parts: Sequence[Component],
    queries: Mapping[int, frozenset[Channel]],
    owners: Owners,
    source: str,
    reader: str,
    attended: tuple[int, int],
) -> DeclaredEdge | None:
    """One edge from the components of all heads, if every head has the same pairs and free dimensions.

    ``attended`` are the attention's query and key heads, which gains of one head's width all share.
    """
    groups: dict[frozenset[int], list[Component]] = {}
    for part in parts:
        groups.setdefault(frozenset(head for head, _ in part.channels), []).append(part)
    kv = sorted(groups, key=min)
    rows, columns, shapes = [], [], []
    for heads in kv:
        keys = sorted(row for part in groups[heads] for row in part.keys)
        columns += keys
        shapes.append(_shape([part.keys for part in groups[heads]], keys))
        for own in _by_query_head(groups[heads], queries):
            flat = sorted(row for part in own for row in part)
            rows += flat
            shapes.append(_shape(own, flat))
    dim = len(columns) // len(kv)
    if any(shape is None or shape != shapes[0] for shape in shapes) or len(rows) % len(columns):
        return None
    pairs, free = shapes[0] or ((), ())
    gains = owners[source].kind == "norm"
    shared = gains and len(rows) == len(columns) == dim
    count = Heads(*attended, dim) if shared else Heads(len(rows) // dim, len(kv), dim)
    query, key = writing(owners[source], rows, "q"), writing(owners[reader], columns, "k")
    limit: Limit = "diagonal" if gains else "matrix"
    return DeclaredEdge("qk", query, (key,), limit, count, pairs=pairs, free=free)


def _by_query_head(
    parts: Sequence[Component], queries: Mapping[int, frozenset[Channel]]
) -> list[list[tuple[int, ...]]]:
    """The query rows of each component, for each set of heads that they touch: a gain's rows touch all of them."""
    heads: dict[frozenset[int], list[tuple[int, ...]]] = {}
    for part in parts:
        own: dict[frozenset[int], list[int]] = {}
        for row in part.queries:
            own.setdefault(frozenset(head for head, _ in queries[row]), []).append(row)
        for key, rows in own.items():
            heads.setdefault(key, []).append(tuple(rows))
    return [heads[key] for key in sorted(heads, key=min)]


def _shape(
    parts: Sequence[tuple[int, ...]], rows: Sequence[int]
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]] | None:
    """Pairs and free dimensions of a head, numbered by the order of its rows; ``None`` for larger components."""
    rank = {row: index for index, row in enumerate(rows)}
    if len(rank) != len(rows) or any(len(part) > MOST_DIMS for part in parts):
        return None
    pairs = sorted((rank[part[0]], rank[part[1]]) for part in parts if len(part) == MOST_DIMS)
    return tuple(pairs), tuple(sorted(rank[part[0]] for part in parts if len(part) == 1))
