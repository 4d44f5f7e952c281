"""The structure of decoder layers by name: the linears to quantize, and the edges across which a map folds.

Everything here is plain data. Names are relative to a layer, as in a declared family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

EdgeKind = Literal["norm", "heads", "channels", "qk"]
Limit = Literal["matrix", "rotation", "diagonal", "positive"]
Origin = Literal["declared", "discovered"]
Indices = range | tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """The heads on both sides of an edge: ``query`` heads read ``kv`` heads of ``dim`` channels."""

    query: int
    kv: int
    dim: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query // self.kv


@dataclass(frozen=True)
class Part:
    """Some channels of a linear, or of a stack of experts (a 3-D parameter, named in full).

    Attributes:
        module: the linear, or the parameter of the experts; its rows are those of each expert.
        rows: output rows, in the order of the edge's channels; ``None``: all.
        columns: input columns, in that order; ``None``: all. Only readers have columns.
        name: what the part holds, for people.

    Rows that follow one another are stored as a ``range``, however they are given:

    >>> Part("qkv", rows=(4, 5, 6), name="k")
    Part(module='qkv', rows=range(4, 7), columns=None, name='k')
    """

    module: str
    rows: Indices | None = None
    columns: Indices | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for side in ("rows", "columns"):
            if (given := getattr(self, side)) is not None:
                object.__setattr__(self, side, compact(given))


def compact(indices: Sequence[int]) -> Indices:
    """Indices as a ``range`` if they follow one another, else as a tuple.

    >>> compact([2, 3, 4]), compact([2, 4])
    (range(2, 5), (2, 4))
    """
    if isinstance(indices, range) and indices.step == 1:
        return indices
    whole = range(indices[0], indices[0] + len(indices)) if indices else range(0)
    return whole if all(a == b for a, b in zip(indices, whole, strict=True)) else tuple(indices)


Ref = str | Part


def module_of(ref: Ref) -> str:
    """The module that holds an end of an edge."""
    return ref.module if isinstance(ref, Part) else ref


@dataclass(frozen=True)
class DeclaredEdge:
    """An edge by names within a layer.

    Attributes:
        kind: ``norm``, ``heads``, ``channels`` or ``qk``.
        src: what writes the channels.
        dst: what reads them; for ``qk`` the key side.
        limit: the largest group of maps that was proven. For ``qk``, ``matrix`` means a scaled rotation of each pair
            and any matrix over the free dimensions of a head; ``diagonal`` one scale for each of them.
        heads: of ``heads`` and ``qk`` edges, and of norms whose gain heads share; rows are ordered by head, then by
            dimension of a head.
        offset: a norm's gain is ``offset + weight``.
        power: rows of ``src`` times ``s`` scale the channels that ``dst`` reads by ``s ** power``.
        pairs: dimensions of a head that a rotary embedding rotates together (``qk``).
        free: dimensions that it leaves alone (``qk``).
        partner: of ``channels``: what ``src`` is multiplied with, channel by channel, before ``dst``: a gate.
        gathers: channels may be repeated and reordered (those of ``partner`` alike), behind a norm also mixed, if the
            readers' columns follow.
        shift: a constant may be subtracted from the channels where every end has a bias that takes it back.
    """

    kind: EdgeKind
    src: Ref
    dst: tuple[Ref, ...]
    limit: Limit = "diagonal"
    heads: Heads | None = None
    offset: float = 0.0
    power: int = 1
    pairs: tuple[tuple[int, int], ...] = ()
    free: tuple[int, ...] = ()
    partner: Ref | None = None
    gathers: bool = False
    shift: bool = False


@dataclass(frozen=True)
class LayerKind:
    """The structure of one decoder layer.

    Attributes:
        groups: linears in execution order, grouped by shared input; without routers and experts.
        edges: the edges that are proven.
        attention: the module whose attention function is looked up in transformers' registry; ``None``: none is.
        flat: linears that the layer calls with ``(tokens, hidden)``.
        transposed: linears that store their matrix as ``(in, out)``.
    """

    groups: tuple[tuple[str, ...], ...]
    edges: tuple[DeclaredEdge, ...]
    attention: str | None = "self_attn"
    flat: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Architecture:
    """What is known of one model.

    Attributes:
        name: the model's type.
        blocks: module path of the list of decoder layers.
        head: the output head.
        embed: the token embedding.
        layers: one entry per decoder layer; entries repeat.
        origin: whether it is written down or was found by experiment.
    """

    name: str
    blocks: str
    head: str
    embed: str
    layers: tuple[LayerKind, ...]
    origin: Origin = "declared"

    def kinds(self) -> dict[LayerKind, list[int]]:
        """The different kinds of layers, and the indices of the layers of each."""
        out: dict[LayerKind, list[int]] = {}
        for index, kind in enumerate(self.layers):
            out.setdefault(kind, []).append(index)
        return out
