"""The declared families in the form in which discovery writes a layer down."""

from __future__ import annotations

from typing import Any

from lowbit.models import architecture
from lowbit.models.discovery.structure import Architecture, DeclaredEdge, Heads, LayerKind, Part, Ref
from lowbit.models.families import family_of

GATES = {"mlp.up_proj": "mlp.gate_proj"}


def declared(config: Any) -> Architecture:
    """The architecture that ``config``'s declared family has."""
    family = family_of(config)
    layers = tuple(_layer(family, config, index) for index in range(config.num_hidden_layers))
    return Architecture(family.name, family.blocks, family.head, family.embed, layers)


def _layer(family: architecture.Family, config: Any, index: int) -> LayerKind:
    heads = family.heads(config)
    rotary = heads.rotary if getattr(config, "no_rope_layers", None) is None or config.no_rope_layers[index] else 0
    edges = tuple(_edge(family, edge, config, heads, rotary) for edge in family.edges)
    flat = frozenset({"fc1", "fc2"}) if family.flat_mlp else frozenset()
    return LayerKind(family.linears, edges, family.attention, flat)


def _edge(
    family: architecture.Family, edge: architecture.DeclaredEdge, config: Any, heads: architecture.Heads, rotary: int
) -> DeclaredEdge:
    def ref(end: architecture.Ref) -> Ref:
        if isinstance(end, str):
            return end
        rows = end.rows(heads, 2 * config.intermediate_size)
        return Part(end.module, range(rows.start, rows.stop), name=end.part)

    ends = ref(edge.src), tuple(map(ref, edge.dst))
    shape = Heads(heads.query, heads.kv, heads.dim)
    if edge.kind == "norm":
        return DeclaredEdge("norm", *ends, offset=family.norm_offset, gathers=True, shift=True)
    if edge.kind == "heads":
        return DeclaredEdge("heads", *ends, "matrix", shape, shift=True)
    if edge.kind == "channels":
        gate = Part(edge.src.module, range(config.intermediate_size), name="gate") if isinstance(
            edge.src, architecture.Part
        ) else GATES.get(edge.src)  # fmt: skip
        return DeclaredEdge(
            "channels", *ends, "positive" if edge.positive else "diagonal", partner=gate, gathers=True
        )
    half = rotary // 2
    pairs = tuple((i, i + half) for i in range(half))
    norms = family.qk_norm_per_head
    limit, offset = ("diagonal", family.norm_offset) if norms else ("matrix", 0.0)
    return DeclaredEdge("qk", *ends, limit, shape, offset, pairs=pairs, free=tuple(range(2 * half, shape.dim)))
