"""An edge found at two small sizes, for a layer at its real size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lowbit.models.architecture import DeclaredEdge, Heads, Part, Ref, module_of
from lowbit.models.discovery.fold import columns_of, rows_of
from lowbit.models.discovery.layout import Mismatch, Sizes
from lowbit.models.discovery.readers import Owners, selected, writing
from lowbit.models.discovery.result import label
from lowbit.models.discovery.rotary import ROTATED

Three = tuple[Owners, Owners, Owners]


def carried(edge: DeclaredEdge, other: DeclaredEdge, owners: Three, sizes: Sizes) -> DeclaredEdge:
    """The edge at real size.

    Args:
        edge: as proven at the first small size.
        other: the same edge at the second.
        owners: linears and norms by name, at both small sizes and at the real one.
        sizes: the layer's sizes.

    Raises:
        Mismatch: the layout cannot be carried, or does not fit the real shapes.
    """
    heads = _heads(edge, other, sizes)
    near = _near(edge, other, heads, owners, sizes)
    source = _rows(edge.src, other.src, owners, near)
    width = len(rows_of(source, owners[2][module_of(source)]))
    if edge.kind == "qk":
        ends: tuple[Ref, ...] = (_rows(edge.dst[0], other.dst[0], owners, near),)
    else:
        ends = _readers(edge, other, width, owners, near)
    dims = near if heads is None else near.with_near(**_dims(edge, other, heads))
    pairs = _pairs(edge, other, dims)
    free = _list(edge.free, other.free, dims)
    partner = None if edge.partner is None else _partner(edge, other, owners, near)
    out = replace(edge, src=source, dst=ends, heads=heads, pairs=pairs, free=free, partner=partner)
    _check(out, width, owners[2])
    return out


def _heads(edge: DeclaredEdge, other: DeclaredEdge, sizes: Sizes) -> Heads | None:
    if edge.heads is None or other.heads is None:
        return None
    query, kv, dim = (
        sizes.carry(getattr(edge.heads, name), getattr(other.heads, name)) for name in ("query", "kv", "dim")
    )
    return Heads(query, kv, dim)


def _dims(edge: DeclaredEdge, other: DeclaredEdge, heads: Heads) -> dict[str, tuple[int, int, int]]:
    assert edge.heads
    assert other.heads
    return {"dim": (edge.heads.dim, other.heads.dim, heads.dim)}


def _near(edge: DeclaredEdge, other: DeclaredEdge, heads: Heads | None, owners: Three, sizes: Sizes) -> Sizes:
    """Sizes of the edge itself: its heads, rows and columns."""
    found: dict[str, tuple[int, ...]] = {}
    for end in (edge.src, *edge.dst, *([edge.partner] if edge.partner else [])):
        name = module_of(end)
        found[f"{name}.rows"] = tuple(one[name].rows for one in owners)
        found[f"{name}.columns"] = tuple(one[name].columns for one in owners)
    if heads is not None and edge.heads and other.heads:
        three = (edge.heads, other.heads, heads)
        for name in ("query", "kv", "dim"):
            found[name] = tuple(getattr(one, name) for one in three)
        found["query*dim"] = tuple(one.query * one.dim for one in three)
        found["kv*dim"] = tuple(one.kv * one.dim for one in three)
        found["group*dim"] = tuple(one.query // one.kv * one.dim for one in three)
    if edge.kind == "qk":
        turned = {name: one for name, one in sizes.far.items() if name.startswith(ROTATED)}
        found |= {name: (one.small, one.other, one.real) for name, one in turned.items()}
    return sizes.with_near(**{name: (a, b, c) for name, (a, b, c) in found.items()})


def _rows(end: Ref, other: Ref, owners: Three, sizes: Sizes) -> Ref:
    name = module_of(end)
    if isinstance(end, str) and isinstance(other, str):
        return name
    small, second = (rows_of(one, own[name]) for one, own in zip((end, other), owners, strict=False))
    rows = _within(sizes.carry_all(small, second), owners[2][name].rows, name)
    return writing(owners[2][name], list(rows), end.name if isinstance(end, Part) else "")


def _partner(edge: DeclaredEdge, other: DeclaredEdge, owners: Three, sizes: Sizes) -> Ref:
    if edge.partner is None or other.partner is None:
        raise Mismatch("a gate at one small size only")
    return _rows(edge.partner, other.partner, owners, sizes)


def _readers(edge: DeclaredEdge, other: DeclaredEdge, width: int, owners: Three, sizes: Sizes) -> tuple[Ref, ...]:
    """Readers; the entries of one that reads every channel several times are carried together."""
    ends: list[Ref] = []
    for name in dict.fromkeys(module_of(end) for end in edge.dst):
        small, second = ([end for end in one.dst if module_of(end) == name] for one in (edge, other))
        if all(isinstance(end, str) for end in (*small, *second)):
            ends.append(name)
            continue
        lists = [
            [column for end in own for column in columns_of(end, at[name])]
            for own, at in zip((small, second), owners, strict=False)
        ]
        columns = _within(sizes.carry_all(*lists), owners[2][name].columns, name)
        step = len(columns) if edge.kind == "heads" else width
        parts = [list(columns[start : start + step]) for start in range(0, len(columns), step)]
        ends += [selected(name, part, owners[2][name].columns) for part in parts]
    return tuple(ends)


def _within(channels: tuple[int, ...], width: int, name: str) -> tuple[int, ...]:
    if len(set(channels)) != len(channels) or min(channels) < 0 or max(channels) >= width:
        raise Mismatch(f"the layout of {name} does not fit {width} channels")
    return channels


def _pairs(edge: DeclaredEdge, other: DeclaredEdge, sizes: Sizes) -> tuple[tuple[int, int], ...]:
    first, second = (_list([p[i] for p in edge.pairs], [p[i] for p in other.pairs], sizes) for i in (0, 1))
    return tuple(zip(first, second, strict=True))


def _list(small: Sequence[int], second: Sequence[int], sizes: Sizes) -> tuple[int, ...]:
    """A list that may be empty at both sizes, or have one number at the second, which shows no stride."""
    if not small and not second:
        return ()
    if not small or not second:
        raise Mismatch("rotary dimensions at one small size only")
    if len(small) > 1 and len(second) == 1:
        second = [second[0], second[0] + small[1] - small[0]]
        count = sizes.carry(len(small), 1)
        base = sizes.carry(small[0], second[0])
        return tuple(base + i * (small[1] - small[0]) for i in range(count))
    return sizes.carry_all(small, second)


def _check(edge: DeclaredEdge, width: int, owners: Owners) -> None:
    """The shapes at real size fit each other."""
    heads = edge.heads
    for end in edge.dst if edge.kind != "qk" else ():
        columns = len(columns_of(end, owners[module_of(end)]))
        if columns % width or (edge.kind != "heads" and columns != width):
            raise Mismatch(f"{module_of(end)} reads {columns} channels of {width}")
    if heads is not None:
        rows = heads.kv if edge.kind == "heads" else heads.query
        shared = edge.kind == "qk" and owners[module_of(edge.src)].kind == "norm" and width == heads.dim
        if (not shared and rows * heads.dim != width) or heads.query % heads.kv:
            raise Mismatch(f"{heads.query} heads over {heads.kv} of {heads.dim} channels, but {width} rows")
        if edge.kind == "qk" and sorted([*edge.free, *(d for pair in edge.pairs for d in pair)]) != list(
            range(heads.dim)
        ):
            raise Mismatch("pairs and free dimensions do not cover a head")


def matched(edges: Sequence[DeclaredEdge], other: Sequence[DeclaredEdge]) -> Mapping[int, DeclaredEdge]:
    """For each candidate, by index, the same one at the other size: equal label, equal position among these."""
    found: dict[int, DeclaredEdge] = {}
    for name in {label(edge) for edge in edges}:
        own = [index for index, edge in enumerate(edges) if label(edge) == name]
        theirs = [edge for edge in other if label(edge) == name]
        if len(own) == len(theirs):
            found |= dict(zip(own, theirs, strict=True))
    return found
