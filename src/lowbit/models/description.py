"""An architecture in words, for people, and as plain data, for the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lowbit.models.architecture import (
    Architecture,
    DeclaredEdge,
    ExpertLinear,
    Experts,
    Heads,
    Indices,
    LayerKind,
    Part,
    Ref,
    compact,
    module_of,
)
from lowbit.models.listed_experts import ListedExperts

GROUPS = {
    "matrix": "any matrix",
    "rotation": "rotations",
    "diagonal": "a diagonal",
    "positive": "a positive diagonal",
}


def described(architecture: Architecture) -> list[dict[str, Any]]:
    """The kinds of layers: which layers are of it, its mixer, its linears and its edges, in words."""
    return [
        {
            "layers": intervals(indices),
            "mixer": _mixer(kind),
            "linears": [" + ".join(group) for group in kind.groups],
            "edges": [edge_text(edge) for edge in kind.edges],
            "kept": list(kind.kept),
        }
        for kind, indices in ((_any_expert(kind), indices) for kind, indices in architecture.kinds().items())
    ]


def _mixer(kind: LayerKind) -> str:
    text = kind.attention or "no attention function: the library's code, Q, K and V are not seen"
    own = kind.experts or kind.listed
    return text if own is None else f"{text}; {own.count} experts in {own.module}"


def _any_expert(kind: LayerKind) -> LayerKind:
    """The kind with ``*`` for the numbers of experts, which are alike: ``mlp.experts.*.up_proj``, each once."""
    if (experts := kind.experts or kind.listed) is None:
        return kind

    def pattern(ref: Ref) -> Ref:
        place = experts.place(module_of(ref))
        if place is None:
            return ref
        own = place[1] if isinstance(place[1], str) else place[1].name
        return _renamed(ref, f"{experts.module}.*.{own}")

    def alike(edge: DeclaredEdge) -> DeclaredEdge:
        dst = tuple(dict.fromkeys(map(pattern, edge.dst)))
        partner = None if edge.partner is None else pattern(edge.partner)
        return replace(edge, src=pattern(edge.src), dst=dst, partner=partner)

    groups = tuple(dict.fromkeys(tuple(module_of(pattern(name)) for name in group) for group in kind.groups))
    return replace(kind, groups=groups, edges=tuple(dict.fromkeys(map(alike, kind.edges))))


def _each_expert(kind: LayerKind) -> LayerKind:
    """The kind with the numbers of experts in place of ``*``: what ``_any_expert`` was given."""
    if (experts := kind.experts or kind.listed) is None:
        return kind
    mark = f"{experts.module}.*."

    def numbered(ref: Ref, number: int) -> Ref:
        return _renamed(ref, module_of(ref).replace(mark, f"{experts.module}.{number}."))

    def readers(ends: tuple[Ref, ...]) -> tuple[Ref, ...]:
        own = [end for end in ends if module_of(end).startswith(mark)]
        each = [numbered(end, number) for number in range(experts.count) for end in own]
        at = ends.index(own[0]) if own else len(ends)
        return (*ends[:at], *each, *(end for end in ends[at:] if end not in own))

    def edges(edge: DeclaredEdge) -> list[DeclaredEdge]:
        if not module_of(edge.src).startswith(mark):
            return [replace(edge, dst=readers(edge.dst))]
        return [
            replace(
                edge,
                src=numbered(edge.src, number),
                dst=tuple(numbered(end, number) for end in edge.dst),
                partner=None if edge.partner is None else numbered(edge.partner, number),
            )
            for number in range(experts.count)
        ]

    marked = [group for group in kind.groups if group[0].startswith(mark)]
    at = kind.groups.index(marked[0]) if marked else len(kind.groups)
    rest = tuple(group for group in kind.groups[at:] if group not in marked)
    groups = (*kind.groups[:at], *(experts.groups if marked else ()), *rest)
    return replace(kind, groups=groups, edges=tuple(own for edge in kind.edges for own in edges(edge)))


def _renamed(ref: Ref, module: str) -> Ref:
    return module if isinstance(ref, str) else replace(ref, module=module)


def intervals(indices: Sequence[int]) -> str:
    """Increasing numbers, shortened.

    >>> intervals([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in parts)


def edge_text(edge: DeclaredEdge) -> str:
    """An edge in words.

    >>> from lowbit.models.architecture import Heads
    >>> edge_text(DeclaredEdge("heads", "v_proj", ("o_proj",), "matrix", Heads(query=4, kv=2, dim=16)))
    'heads: v_proj -> o_proj (any matrix, 4 query and 2 key/value heads of width 16)'
    """
    facts = [GROUPS[edge.limit]]
    if edge.kind == "qk" and edge.limit == "matrix":
        facts = [*["scaled rotations"][: bool(edge.pairs)], *["any matrix"][: bool(edge.free)]]
    if edge.heads is not None:
        facts.append(f"{edge.heads.query} query and {edge.heads.kv} key/value heads of width {edge.heads.dim}")
    if edge.pairs:
        facts.append(f"{len(edge.pairs)} rotary pairs")
    if edge.free and edge.pairs:
        facts.append(f"{len(edge.free)} dimensions without")
    if edge.power != 1:
        facts.append(f"power {edge.power}")
    if edge.offset:
        facts.append(f"gain {edge.offset:g} + weight")
    return f"{edge.kind}: {_ref_text(edge.src)} -> {', '.join(map(_ref_text, edge.dst))} ({', '.join(facts)})"


def _ref_text(ref: Ref) -> str:
    if isinstance(ref, str):
        return ref
    return f"{ref.name or 'part'} of {ref.module}"


def to_dict(architecture: Architecture) -> dict[str, Any]:
    """Plain data, as JSON has it, that determines the architecture, each kind of layer once."""
    return {
        "name": architecture.name,
        "origin": architecture.origin,
        "blocks": architecture.blocks,
        "head": architecture.head,
        "embed": architecture.embed,
        **({"text_model": architecture.text_model} if architecture.text_model else {}),
        "kinds": [{"layers": indices, **_kind(kind)} for kind, indices in architecture.kinds().items()],
    }


def from_dict(data: Mapping[str, Any]) -> Architecture:
    """The architecture whose ``to_dict`` is ``data``; ``KeyError``, ``TypeError`` or ``ValueError`` if it is none."""
    layers = {index: kind for own in data["kinds"] for kind in [_kind_of(own)] for index in own["layers"]}
    if sorted(layers) != list(range(len(layers))):
        raise ValueError("layers are missing")
    named = {key: data[key] for key in ("name", "origin", "blocks", "head", "embed")}
    kinds = tuple(layers[index] for index in range(len(layers)))
    return Architecture(**named, layers=kinds, text_model=data.get("text_model", ""))


def _kind_of(data: Mapping[str, Any]) -> LayerKind:
    return _each_expert(
        LayerKind(
            groups=tuple(tuple(group) for group in data["groups"]),
            edges=tuple(_edge_of(edge) for edge in data["edges"]),
            attention=data["attention"],
            flat=frozenset(data["flat"]),
            transposed=frozenset(data["transposed"]),
            experts=_experts_of(data["experts"]) if "experts" in data else None,
            listed=_listed_of(data["listed"]) if "listed" in data else None,
            routers=frozenset(data.get("routers", ())),
            kept=tuple(data.get("kept", ())),
        )
    )


def _experts_of(data: Mapping[str, Any]) -> Experts:
    said: dict[str, Any] = {**data}
    linears = [ExpertLinear(**{**own, "rows": _rows_of(own["rows"])}) for own in said.pop("linears")]
    return Experts(**said, reads=tuple(linears[:-1]), writes=linears[-1])


def _listed_of(data: Mapping[str, Any]) -> ListedExperts:
    return ListedExperts(**{**data, "own_groups": tuple(tuple(group) for group in data["own_groups"])})


def _rows_of(said: Mapping[str, int]) -> Indices:
    stop = said["start"] + said["step"] * said["count"]
    return compact(tuple(range(said["start"], stop, said["step"])))


def _edge_of(data: Mapping[str, Any]) -> DeclaredEdge:
    said: dict[str, Any] = {**data, "src": _ref_of(data["src"]), "dst": tuple(map(_ref_of, data["dst"]))}
    if "heads" in said:
        said["heads"] = Heads(**said["heads"])
    if "partner" in said:
        said["partner"] = _ref_of(said["partner"])
    if "pairs" in said:
        said["pairs"] = tuple((first, second) for first, second in said["pairs"])
    if "free" in said:
        said["free"] = tuple(said["free"])
    return DeclaredEdge(**said)


def _ref_of(data: str | Mapping[str, Any]) -> Ref:
    if isinstance(data, str):
        return data
    sides = {side: indices_of(data[side]) for side in ("rows", "columns") if side in data}
    return Part(data["module"], **sides, name=data["name"])


def _kind(kind: LayerKind) -> dict[str, Any]:
    kind = _any_expert(kind)
    mixture: dict[str, Any] = {} if kind.experts is None else {"experts": _experts(kind.experts)}
    mixture |= {} if kind.listed is None else {"listed": _plain(kind.listed)}
    mixture |= {"routers": sorted(kind.routers)} if kind.routers else {}
    mixture |= {"kept": list(kind.kept)} if kind.kept else {}
    return {
        **mixture,
        "groups": [list(group) for group in kind.groups],
        "attention": kind.attention,
        "flat": sorted(kind.flat),
        "transposed": sorted(kind.transposed),
        "edges": [_edge(edge) for edge in kind.edges],
    }


def _plain(listed: ListedExperts) -> dict[str, Any]:
    return {**asdict(listed), "own_groups": [list(group) for group in listed.own_groups]}


def _experts(experts: Experts) -> dict[str, Any]:
    linears = [{**asdict(linear), "rows": _strided(linear.rows)} for linear in experts.linears]
    said = {key: value for key, value in vars(experts).items() if key not in ("reads", "writes")}
    return {**said, "linears": linears}


def _strided(rows: Indices) -> dict[str, int]:
    """The rows of an expert's linear: as many, from the first on, at equal steps.

    >>> _strided((1, 3, 5))
    {'start': 1, 'step': 2, 'count': 3}
    """
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    assert tuple(rows) == tuple(range(rows[0], rows[0] + step * len(rows), step)), "rows at unequal steps"
    return {"start": rows[0], "step": step, "count": len(rows)}


def _edge(edge: DeclaredEdge) -> dict[str, Any]:
    default = DeclaredEdge(edge.kind, edge.src, edge.dst)
    said = {key: value for key, value in vars(edge).items() if value != getattr(default, key)}
    if edge.heads is not None:
        said["heads"] = asdict(edge.heads)
    if edge.partner is not None:
        said["partner"] = _ref(edge.partner)
    if edge.pairs:
        said["pairs"] = [list(pair) for pair in edge.pairs]
    if edge.free:
        said["free"] = list(edge.free)
    return {"kind": edge.kind, "src": _ref(edge.src), "dst": [_ref(ref) for ref in edge.dst], **said}


def _ref(ref: Ref) -> str | dict[str, Any]:
    if not isinstance(ref, Part):
        return ref
    said = {"module": ref.module, "name": ref.name}
    return said | {side: runs(indices) for side in ("rows", "columns") if (indices := getattr(ref, side)) is not None}


def indices_of(stretches: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The numbers of ``[first, count]`` stretches.

    >>> indices_of([[4, 3], [12, 2]])
    (4, 5, 6, 12, 13)
    """
    return tuple(first + i for first, count in stretches for i in range(count))


def runs(indices: Indices) -> list[list[int]]:
    """Indices as ``[first, count]`` of each stretch of consecutive ones.

    >>> runs((0, 1, 2, 8, 9, 4))
    [[0, 3], [8, 2], [4, 1]]
    """
    if isinstance(indices, range):
        return [[indices.start, len(indices)]]
    out: list[list[int]] = []
    for index in indices:
        if out and index == out[-1][0] + out[-1][1]:
            out[-1][1] += 1
        else:
            out.append([index, 1])
    return out
