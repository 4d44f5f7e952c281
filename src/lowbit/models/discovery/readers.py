"""Edges that one response shows: a norm and its readers, rows of a linear and the columns that read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lowbit.models.architecture import DeclaredEdge, Part, Ref
from lowbit.models.discovery.response import Response
from lowbit.models.discovery.sites import Owner

Owners = Mapping[str, Owner]


def norm_edge(owner: Owner, response: Response, owners: Owners) -> DeclaredEdge | str:
    """The edge from a norm to all that read it, or why there is none."""
    refuted = [where for where in response.refuted if where]
    if refuted:
        return f"a scale of a channel does not come back at {refuted[0]}"
    ends = reading(response, list(range(owner.rows)), owners)
    return ends if isinstance(ends, str) else DeclaredEdge("norm", owner.name, ends)


def channels_edges(owner: Owner, response: Response, owners: Owners, values_too: bool = False) -> list[DeclaredEdge]:
    """The edges from a linear's rows, one for each set of rows of which every column reads one.

    Rows that attention sees as values are left to ``heads``, unless ``values_too``.
    """
    touched = [] if values_too else [value.flatten(1).any(1) for value in response.touched.values()]
    seen = torch.stack(touched).any(0) if touched else torch.zeros(len(response.refuted), dtype=torch.bool)
    rows = [row for row, where in enumerate(response.refuted) if not where and not bool(seen[row])]
    edges = []
    for power, own in _by_power(response, rows).items():
        for some in _one_for_each_column(response, own):
            edge = _channels_edge(owner, response, some, power, owners)
            edges += [edge] if edge else []
    return edges


def _by_power(response: Response, rows: Iterable[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row in rows:
        powers = {int(p) for hit in response.hits.values() for p in hit[row].unique() if p}
        if len(powers) == 1:
            found.setdefault(powers.pop(), []).append(row)
    return found


def _one_for_each_column(response: Response, rows: Sequence[int]) -> list[list[int]]:
    """Rows split so that no two of a set are read by the same column: three products have three sets."""
    sets: list[list[int]] = []
    taken: list[set[tuple[str, int]]] = []
    for row in rows:
        columns = {(name, int(c)) for name, hit in response.hits.items() for c in hit[row].nonzero().flatten()}
        at = next((i for i, used in enumerate(taken) if not used & columns), len(sets))
        if at == len(sets):
            sets.append([])
            taken.append(set())
        sets[at].append(row)
        taken[at] |= columns
    return sets


def _channels_edge(
    owner: Owner, response: Response, rows: list[int], power: int, owners: Owners
) -> DeclaredEdge | None:
    main = next(name for name, hit in response.hits.items() if bool(hit[rows].any()))
    rows = sorted(rows, key=lambda row: int(response.hits[main][row].nonzero()[0]))
    if owner.experts and len(response.refuted) > owner.rows:  # a channel for every expert's
        own = _of_each_expert(owner, response, rows, owners)
        if own is None:
            return None
        rows, ends = own
    else:
        found = reading(response, rows, owners)
        if isinstance(found, str):
            return None
        ends = found
    return DeclaredEdge("channels", writing(owner, rows), ends, power=power)


def _of_each_expert(
    owner: Owner, response: Response, rows: Sequence[int], owners: Owners
) -> tuple[list[int], tuple[Ref, ...]] | None:
    """Rows and columns within one expert, if they are the same in all of them and no expert reads another's."""
    first = [row for row in rows if row < owner.rows]
    every = {expert * owner.rows + row for expert in range(owner.experts) for row in first}
    if set(rows) != every or any(owners[name].experts != owner.experts for name in response.hits):
        return None
    patterns = []
    for expert in range(owner.experts):
        own = Response({}, response.refuted, {})
        for name, hit in response.hits.items():
            width = owners[name].columns
            block = hit[[expert * owner.rows + row for row in first]]
            inside = block[:, expert * width : (expert + 1) * width]
            if bool(block.any()) and int((block != 0).sum()) != int((inside != 0).sum()):
                return None
            own.hits[name] = inside
        patterns.append(reading(own, list(range(len(first))), owners))
    if isinstance(patterns[0], str) or any(pattern != patterns[0] for pattern in patterns):
        return None
    return first, patterns[0]


def reading(response: Response, rows: Sequence[int], owners: Owners) -> tuple[Ref, ...] | str:
    """Where ``rows`` are read, in their order, or why that is no edge.

    A reader of which several columns read the same row, such as a projection behind a gain that heads share, has an
    entry for each.
    """
    ends: list[Ref] = []
    for name, hit in response.hits.items():
        columns = [_columns(hit[row], owners[name]) for row in rows]
        if not any(columns):
            continue
        if len({len(one) for one in columns}) > 1:
            return f"{name} reads some of the channels only"
        for own in zip(*columns, strict=True):
            ends.append(selected(name, list(own), owners[name].columns))
    return tuple(ends) if ends else "nothing reads it"


def _columns(hit: Tensor, owner: Owner) -> list[int]:
    """Columns of an owner; experts that are fed in a batch have a channel for each expert, which share columns."""
    return sorted({int(column) % owner.columns for column in hit.nonzero().flatten()})


def selected(name: str, columns: list[int], width: int) -> Ref:
    """The whole linear, or its columns."""
    return name if columns == list(range(width)) else Part(name, columns=tuple(columns))


def writing(owner: Owner, rows: list[int], name: str = "") -> Ref:
    """The whole linear, or its rows, which ``name`` tells to people."""
    return owner.name if rows == list(range(owner.rows)) else Part(owner.name, rows=tuple(rows), name=name)
