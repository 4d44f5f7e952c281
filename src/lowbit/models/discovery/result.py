"""What discovery finds: an architecture, and the record of how it was found; to JSON and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from lowbit.models.architecture import (
    Architecture,
    DeclaredEdge,
    Heads,
    LayerKind,
    Limit,
    Part,
    Ref,
    module_of,
)


def label(edge: DeclaredEdge) -> str:
    """``channels mlp.up_proj > mlp.down_proj``."""
    readers = dict.fromkeys(module_of(end) for end in edge.dst)
    return f"{edge.kind} {module_of(edge.src)} > {', '.join(readers)}"


@dataclass(frozen=True)
class Finding:
    """What became of one candidate.

    Attributes:
        layer: index of the kind of layer.
        edge: its ``label``; of a source without an edge, its name.
        limit: the proven group; ``None`` where there is no edge.
        reason: why there is none, or why a larger group is refuted.
        offered: it was offered to the proof; otherwise no reader showed the scale of its channels.
    """

    layer: int
    edge: str
    limit: Limit | None
    reason: str = ""
    offered: bool = True


@dataclass(frozen=True)
class Record:
    """How an architecture was found.

    Attributes:
        findings: every candidate.
        notes: what was left out and why, such as a proof at real shape that needs too much memory.
        checked: kinds of layers whose edges are proven at real shape too.
        experts: of each kind of layer, the 3-D parameters of experts, the input side first.
        unseen: of each kind of layer, linears that no forward pass calls as such.
        seconds: time it took.
        versions: of transformers and torch.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    checked: tuple[int, ...]
    experts: tuple[tuple[str, ...], ...]
    unseen: tuple[tuple[str, ...], ...]
    seconds: float
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Discovery:
    """An architecture and its record."""

    architecture: Architecture
    record: Record

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json``; each kind of layer is stored once, with the layers that are of it."""
        own = self.architecture
        named = {name: getattr(own, name) for name in ("name", "origin", "blocks", "head", "embed")}
        kinds = [{"layers": layers, **_plain(kind)} for kind, layers in own.kinds().items()]
        return {"architecture": {**named, "kinds": kinds}, "record": asdict(self.record)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The value whose ``to_json`` is ``data``; ``KeyError``, ``TypeError`` or ``ValueError`` if it is none."""
        own, record = dict(data["architecture"]), dict(data["record"])
        layers = {
            index: kind for stored in own.pop("kinds") for kind in [_kind(stored)] for index in stored["layers"]
        }
        if sorted(layers) != list(range(len(layers))):
            raise ValueError("layers are missing")
        record["findings"] = tuple(Finding(**finding) for finding in record["findings"])
        record |= {key: tuple(record[key]) for key in ("notes", "checked")}
        record |= {key: tuple(tuple(own) for own in record[key]) for key in ("experts", "unseen")}
        return cls(Architecture(**own, layers=tuple(layers[index] for index in range(len(layers)))), Record(**record))


def _plain(kind: LayerKind) -> dict[str, Any]:
    edges = [_plain_edge(edge) for edge in kind.edges]
    lists = {"flat": sorted(kind.flat), "transposed": sorted(kind.transposed)}
    return {**vars(kind), "groups": [list(group) for group in kind.groups], **lists, "edges": edges}


def _plain_edge(edge: DeclaredEdge) -> dict[str, Any]:
    ends = {"src": _plain_ref(edge.src), "dst": [_plain_ref(end) for end in edge.dst]}
    more = {"heads": edge.heads and asdict(edge.heads), "partner": edge.partner and _plain_ref(edge.partner)}
    return {**vars(edge), **ends, **more}


def _plain_ref(ref: Ref) -> str | dict[str, Any]:
    if isinstance(ref, str):
        return ref
    sides = {side: None if (own := getattr(ref, side)) is None else [*runs(own)] for side in ("rows", "columns")}
    return {"module": ref.module, "name": ref.name, **sides}


def _kind(data: Mapping[str, Any]) -> LayerKind:
    return LayerKind(
        groups=tuple(tuple(group) for group in data["groups"]),
        edges=tuple(_edge(edge) for edge in data["edges"]),
        attention=data["attention"],
        flat=frozenset(data["flat"]),
        transposed=frozenset(data["transposed"]),
    )


def _edge(data: Mapping[str, Any]) -> DeclaredEdge:
    ends = {"src": _ref(data["src"]), "dst": tuple(_ref(end) for end in data["dst"])}
    dims = {"pairs": tuple((first, second) for first, second in data["pairs"]), "free": tuple(data["free"])}
    heads = Heads(**data["heads"]) if data["heads"] else None
    partner = _ref(data["partner"]) if data["partner"] else None
    return DeclaredEdge(**{**data, **ends, **dims, "heads": heads, "partner": partner})


def _ref(data: str | Mapping[str, Any]) -> Ref:
    if isinstance(data, str):
        return data
    rows, columns = (None if data[side] is None else unrolled(data[side]) for side in ("rows", "columns"))
    return Part(data["module"], rows, columns, data["name"])


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as ``(first, count)``.

    >>> list(runs((4, 5, 6, 12, 13)))
    [(4, 3), (12, 2)]
    """
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], at - start
            start = at


def unrolled(stretches: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The numbers of ``(first, count)`` stretches.

    >>> unrolled([[4, 3], [12, 2]])
    (4, 5, 6, 12, 13)
    """
    return tuple(first + i for first, count in stretches for i in range(count))
