"""Candidates of a small model, and what is left of them after the proofs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowbit.models.architecture import DeclaredEdge
from lowbit.models.discovery.capture import capture
from lowbit.models.discovery.direct_reads import read_directly
from lowbit.models.discovery.kinds import kinds_of
from lowbit.models.discovery.layer import Analysis, analyse
from lowbit.models.discovery.proof import LayerProof, ModelProof, attempts, random_moves
from lowbit.models.discovery.properties import with_properties
from lowbit.models.discovery.result import Finding, label
from lowbit.models.discovery.sites import InFloat64
from lowbit.models.discovery.small_model import SmallModel


@dataclass
class Kind:
    """Layers of the small model that are alike.

    Attributes:
        layers: their indices.
        analysis: what the first of them showed.
        edges: what is proven, by index of the candidate.
        findings: every candidate.
    """

    layers: list[int]
    analysis: Analysis
    edges: dict[int, DeclaredEdge]
    findings: list[Finding]


def found_in(small: SmallModel, firsts: Sequence[int] | None = None) -> list[Kind]:
    """The kinds of layers of a small model, with candidates only.

    Args:
        small: the model.
        firsts: the layers to look at; by default the first of each kind.
    """
    with InFloat64():
        calls = [call.redrawn(0) for call in capture(small)]
    kinds = kinds_of(small.layers) if firsts is None else [[index] for index in firsts]
    found = []
    for own in kinds:
        layer, call = small.layers[own[0]], calls[own[0]]
        found.append(Kind(own, analyse(layer, call, read_directly(small, own[0], call)), {}, []))
    return found


def prove(small: SmallModel, kinds: Sequence[Kind]) -> None:
    """Keep the candidates that pass in the layer and in the model, alone and all together."""
    with InFloat64():
        calls = [call.redrawn(0) for call in capture(small)]
    model = ModelProof(small)
    generator = torch.Generator().manual_seed(5)
    for number, kind in enumerate(kinds):
        layer = LayerProof(small.layers[kind.layers[0]], calls[kind.layers[0]], kind.analysis.owners)
        kind.findings += [Finding(number, what, None, why, offered=False) for what, why in kind.analysis.refuted]
        for index, candidate in enumerate(kind.analysis.candidates):
            edge, why = _largest(candidate, layer, model, kind, generator)
            kind.findings.append(Finding(number, label(candidate), edge.limit if edge else None, why))
            if edge:
                kind.edges[index] = with_properties(edge, layer, kind.analysis.responses)
    _together(model, kinds, generator)


def _largest(
    candidate: DeclaredEdge, layer: LayerProof, model: ModelProof, kind: Kind, generator: torch.Generator
) -> tuple[DeclaredEdge | None, str]:
    """The edge with the largest group that passes, and why a larger one does not."""
    why = ""
    owners = kind.analysis.owners
    for edge in attempts(candidate, owners):
        moves = random_moves(edge, owners, kind.layers, generator)
        refuted = layer.refutation(edge, moves[0][3]) or model.refutation(moves)
        if not refuted:
            return edge, why if edge.limit != candidate.limit else ""
        why = why or refuted
    return None, why


def _together(model: ModelProof, kinds: Sequence[Kind], generator: torch.Generator) -> None:
    """Apply every proven edge of every layer at once; where they do not get along, later ones are given up."""

    def moves(chosen: Sequence[tuple[Kind, int]]) -> list[Any]:
        return [
            move
            for kind, index in chosen
            for move in random_moves(kind.edges[index], kind.analysis.owners, kind.layers, generator)
        ]

    every = [(kind, index) for kind in kinds for index in kind.edges]
    if not every or not model.refutation(moves(every)):
        return
    kept: list[tuple[Kind, int]] = []
    for kind, index in every:
        if model.refutation(moves([*kept, (kind, index)])):
            name = label(kind.edges.pop(index))
            at = next(i for i, one in enumerate(kind.findings) if one.edge == name and one.limit)
            kind.findings[at] = replace(kind.findings[at], limit=None, reason="does not pass with the other edges")
        else:
            kept.append((kind, index))
