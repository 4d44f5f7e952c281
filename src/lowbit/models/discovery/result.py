"""What discovery finds: the architecture of a model, one entry per decoder layer, and the record of how it was found.

Names are relative to a layer, as in a declared family. Everything here is plain data that goes to JSON and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

EdgeKind = Literal["norm", "heads", "channels", "qk"]
Limit = Literal["matrix", "rotation", "diagonal", "positive"]


@dataclass(frozen=True)
class Part:
    """Some channels of a linear, or of a stack of experts (a 3-D parameter, named in full).

    Attributes:
        module: the linear, or the parameter of the experts; its rows are those of each expert.
        rows: output rows, in the order of the edge's channels; ``None``: all.
        columns: input columns, in that order; ``None``: all. Only readers have columns.
    """

    module: str
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None


Endpoint = str | Part


def module_of(end: Endpoint) -> str:
    """The name in an endpoint."""
    return end if isinstance(end, str) else end.module


@dataclass(frozen=True)
class Heads:
    """The attention's shape at an edge: ``query`` heads read ``kv`` heads of ``dim`` channels, ``rotary`` rotated."""

    query: int
    kv: int
    dim: int
    rotary: int = 0


@dataclass(frozen=True)
class DeclaredEdge:
    """An edge by names within a layer.

    Attributes:
        kind: ``norm``, ``heads``, ``channels`` or ``qk``.
        src: what writes the channels.
        dst: what reads them; for ``qk`` the key side.
        heads: of ``heads`` and ``qk`` edges; rows are ordered by head, then by dimension of a head.
        offset: a norm's gain is ``offset + weight``.
        limit: the largest group of maps that was proven. For ``qk``, ``matrix`` means a scaled rotation of each pair
            and any matrix over the free dimensions of a head; ``diagonal`` one scale for each of them.
        power: rows of ``src`` times ``s`` scale the channels that ``dst`` reads by ``s ** power``.
        pairs: dimensions of a head that a rotary embedding rotates together (``qk``).
        free: dimensions that it leaves alone (``qk``).
    """

    kind: EdgeKind
    src: Endpoint
    dst: tuple[Endpoint, ...]
    heads: Heads | None = None
    offset: float = 0.0
    limit: Limit = "diagonal"
    power: int = 1
    pairs: tuple[tuple[int, int], ...] = ()
    free: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """``channels mlp.up_proj > mlp.down_proj``."""
        readers = dict.fromkeys(module_of(end) for end in self.dst)
        return f"{self.kind} {module_of(self.src)} > {', '.join(readers)}"


@dataclass(frozen=True)
class LayerKind:
    """The structure of one decoder layer.

    Attributes:
        groups: linears in execution order, grouped by shared input; without routers and experts.
        edges: the edges that are proven.
        attention: the module whose attention function is looked up in transformers' registry; ``None``: there is none.
        flat: linears that the layer calls with ``(tokens, hidden)``.
        experts: 3-D parameters of experts, the input side first.
        unseen: linears that no forward pass calls as such.
    """

    groups: tuple[tuple[str, ...], ...]
    edges: tuple[DeclaredEdge, ...]
    attention: str | None = None
    flat: frozenset[str] = frozenset()
    experts: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """What is known of one model.

    Attributes:
        name: the model's type.
        blocks: module path of the list of decoder layers.
        head: the output head.
        embed: the token embedding.
        layers: one entry per decoder layer; entries repeat.
    """

    name: str
    blocks: str
    head: str
    embed: str
    layers: tuple[LayerKind, ...]
    origin: Literal["declared", "discovered"] = "discovered"

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The different entries of ``layers``, in order."""
        return tuple(dict.fromkeys(self.layers))


@dataclass(frozen=True)
class Finding:
    """What became of one candidate.

    Attributes:
        layer: index of the kind of layer.
        edge: ``DeclaredEdge.label``.
        limit: the proven group; ``None`` where the candidate is refuted.
        reason: why it is refuted, or why a larger group is.
    """

    layer: int
    edge: str
    limit: Limit | None
    reason: str = ""


@dataclass(frozen=True)
class Record:
    """How an architecture was found.

    Attributes:
        findings: every candidate.
        notes: what was left out and why, such as a proof at real shape that needs too much memory.
        checked: kinds of layers whose edges are proven at real shape too.
        seconds: time it took.
        versions: of transformers and torch.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    checked: tuple[int, ...]
    seconds: float
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Discovery:
    """An architecture and its record."""

    architecture: Architecture
    record: Record

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json``; each kind of layer is stored once."""
        own, kinds = self.architecture, self.architecture.kinds
        stored = asdict(own) | {"kinds": [_plain(kind) for kind in kinds], "layers": [kinds.index(k) for k in own.layers]}
        return {"architecture": stored, "record": asdict(self.record)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The value whose ``to_json`` is ``data``; ``KeyError``, ``TypeError`` or ``ValueError`` if it is none."""
        own, record = dict(data["architecture"]), dict(data["record"])
        kinds = [_kind(kind) for kind in own.pop("kinds")]
        own["layers"] = tuple(kinds[index] for index in own["layers"])
        record["findings"] = tuple(Finding(**finding) for finding in record["findings"])
        record |= {key: tuple(record[key]) for key in ("notes", "checked")}
        return cls(Architecture(**own), Record(**record))


def _plain(kind: LayerKind) -> dict[str, Any]:
    return asdict(kind) | {"flat": sorted(kind.flat)}


def _kind(data: Mapping[str, Any]) -> LayerKind:
    edges = tuple(_edge(edge) for edge in data["edges"])
    groups = tuple(tuple(group) for group in data["groups"])
    lists = {key: tuple(data[key]) for key in ("experts", "unseen")}
    return LayerKind(groups, edges, data["attention"], frozenset(data["flat"]), **lists)


def _edge(data: Mapping[str, Any]) -> DeclaredEdge:
    ends = {"src": _endpoint(data["src"]), "dst": tuple(_endpoint(end) for end in data["dst"])}
    dims = {"pairs": tuple((first, second) for first, second in data["pairs"]), "free": tuple(data["free"])}
    heads = Heads(**data["heads"]) if data["heads"] else None
    return DeclaredEdge(**{**data, **ends, **dims, "heads": heads})


def _endpoint(data: str | Mapping[str, Any]) -> Endpoint:
    if isinstance(data, str):
        return data
    return Part(data["module"], *(None if data[key] is None else tuple(data[key]) for key in ("rows", "columns")))


def runs(numbers: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as ``(first, length)``.

    >>> list(runs((4, 5, 6, 12, 13)))
    [(4, 3), (12, 2)]
    """
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], at - start
            start = at
