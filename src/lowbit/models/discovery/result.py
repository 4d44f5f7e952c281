"""What discovery finds: an architecture, and the record of how it was found; to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from lowbit.models.architecture import Architecture, DeclaredEdge, Limit, module_of
from lowbit.models.description import from_dict, to_dict


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
        experts: of each kind of layer, the parameters of its experts, the input side first.
        kept: of each kind of layer, parameters of experts that stay float.
        unseen: of each kind of layer, linears that no forward pass calls as such.
        seconds: time it took.
        versions: of transformers and torch.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    checked: tuple[int, ...]
    experts: tuple[tuple[str, ...], ...]
    kept: tuple[tuple[str, ...], ...]
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
        return {"architecture": to_dict(self.architecture), "record": asdict(self.record)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The value whose ``to_json`` is ``data``; ``KeyError``, ``TypeError`` or ``ValueError`` if it is none."""
        record = dict(data["record"])
        record["findings"] = tuple(Finding(**finding) for finding in record["findings"])
        record |= {key: tuple(record[key]) for key in ("notes", "checked")}
        record |= {key: tuple(tuple(own) for own in record[key]) for key in ("experts", "kept", "unseen")}
        return cls(from_dict(data["architecture"]), Record(**record))
