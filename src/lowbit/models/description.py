"""An architecture in words, for people, and as plain data, for the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lowbit.models.architecture import Architecture, DeclaredEdge, Indices, LayerKind, Part, Ref

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
            "mixer": kind.attention or "no attention function: the library's code, Q, K and V are not seen",
            "linears": [" + ".join(group) for group in kind.groups],
            "edges": [edge_text(edge) for edge in kind.edges],
        }
        for kind, indices in architecture.kinds().items()
    ]


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
    """Plain data that determines the architecture, each kind of layer once."""
    return {
        "name": architecture.name,
        "origin": architecture.origin,
        "blocks": architecture.blocks,
        "head": architecture.head,
        "embed": architecture.embed,
        **({"text_model": architecture.text_model} if architecture.text_model else {}),
        "kinds": [{"layers": indices, **_kind(kind)} for kind, indices in architecture.kinds().items()],
    }


def _kind(kind: LayerKind) -> dict[str, Any]:
    return {
        "groups": [list(group) for group in kind.groups],
        "attention": kind.attention,
        "flat": sorted(kind.flat),
        "transposed": sorted(kind.transposed),
        "edges": [_edge(edge) for edge in kind.edges],
    }


def _edge(edge: DeclaredEdge) -> dict[str, Any]:
    default = DeclaredEdge(edge.kind, edge.src, edge.dst)
    said = {key: value for key, value in vars(edge).items() if value != getattr(default, key)}
    if edge.heads is not None:
        said["heads"] = asdict(edge.heads)
    if edge.partner is not None:
        said["partner"] = _ref(edge.partner)
    return {"kind": edge.kind, "src": _ref(edge.src), "dst": [_ref(ref) for ref in edge.dst], **said}


def _ref(ref: Ref) -> str | dict[str, Any]:
    if not isinstance(ref, Part):
        return ref
    said = {"module": ref.module, "name": ref.name}
    return said | {side: runs(indices) for side in ("rows", "columns") if (indices := getattr(ref, side)) is not None}


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
