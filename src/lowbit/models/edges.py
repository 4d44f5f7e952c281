"""The matrices and norms of a layer as methods see them, and the edges between them.

``resolve`` turns the names of a ``LayerKind`` into these types. A matrix is ``(out, in)`` here, whatever the library
stores: a block turns matrices that are stored transposed when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lowbit.models.architecture import DeclaredEdge, EdgeKind, Heads, Indices, LayerKind, Limit, Part, Ref

Pooling = Literal["mean", "amax", "amin"]


@dataclass(frozen=True)
class Norm:
    """A norm of a block, by name: a gain ``(width,)`` and, for a LayerNorm, a bias.

    Attributes:
        module: its name.
        width: entries of the gain.
    """

    module: str
    width: int

    @property
    def parameter(self) -> str:
        """Name of the gain."""
        return f"{self.module}.weight"

    @property
    def bias(self) -> str:
        """Name of the bias; only LayerNorms have one."""
        return f"{self.module}.bias"


@dataclass(frozen=True)
class Projection:
    """One matrix of a layer, ``(out, in)``: a linear, or some of its output rows and input columns.

    Attributes:
        module: name of the linear that holds the matrix.
        rows: the matrix's output rows within the linear's parameter, in order.
        whole: the rows are those of the entire parameter.
        columns: the matrix's input columns within the parameter, in order; ``None``: all.
    """

    module: str
    rows: Indices
    whole: bool = True
    columns: Indices | None = None

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds the matrix."""
        return f"{self.module}.weight"

    @property
    def bias(self) -> str:
        """Name of the linear's bias, which is optional."""
        return f"{self.module}.bias"

    @property
    def out(self) -> int:
        """Number of output channels."""
        return len(self.rows)

    @cached_property
    def index(self) -> slice | Tensor:
        """``rows`` as a tensor's index."""
        return index_of(self.rows)

    def read(self, params: Mapping[str, Tensor]) -> Tensor:
        """The matrix ``(out, in)``."""
        return self.inputs(params[self.parameter][self.index])

    def read_rows(self, params: Mapping[str, Tensor]) -> Tensor:
        """The matrix with the columns that are not its own, too."""
        return params[self.parameter][self.index]

    def read_bias(self, params: Mapping[str, Tensor]) -> Tensor | None:
        """The bias ``(out,)``, or ``None`` if the linear has none."""
        return params[self.bias][self.index] if self.bias in params else None

    def inputs(self, values: Tensor) -> Tensor:
        """Of ``(..., columns of the parameter)``, those of the matrix ``(..., in)``."""
        return values if self.columns is None else values[..., index_of(self.columns)]

    def outer(self, factor: Tensor, columns: int, rest: float = 1.0) -> Tensor:
        """A value for each input of the matrix as one for each of the parameter's ``columns``; or ``rest``."""
        if self.columns is None:
            return factor
        out = factor.new_full((columns,), rest)
        out[index_of(self.columns)] = factor
        return out

    def change(self, params: MutableMapping[str, Tensor], by: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows, and their bias if there is one, by ``by`` of them; differentiable where ``by`` is.

        ``by`` takes ``(out, ...)`` and keeps the shape.
        """
        for name in (self.parameter, self.bias):
            if name in params:
                params[name] = self._with_rows_replaced(params[name], by(params[name][self.index]))

    def change_weight(self, params: MutableMapping[str, Tensor], by: Callable[[Tensor], Tensor]) -> None:
        """Replace the matrix by ``by`` of it, alone."""
        changed, rows = by(self.read(params)), self.read_rows(params)
        if self.columns is not None:
            changed = rows.index_copy(1, torch.tensor(self.columns, device=rows.device), changed.to(rows.dtype))
        params[self.parameter] = self._with_rows_replaced(params[self.parameter], changed)

    def change_bias(self, params: MutableMapping[str, Tensor], by: Callable[[Tensor], Tensor]) -> None:
        """``change`` for the bias alone, which must exist."""
        params[self.bias] = self._with_rows_replaced(params[self.bias], by(params[self.bias][self.index]))

    def _with_rows_replaced(self, parameter: Tensor, rows: Tensor) -> Tensor:
        if self.whole:
            return rows
        if isinstance(self.rows, range):
            return torch.cat([parameter[: self.rows.start], rows, parameter[self.rows.stop :]])
        return parameter.to(rows.dtype).index_copy(0, torch.tensor(self.rows, device=rows.device), rows)


def index_of(indices: Indices) -> slice | Tensor:
    """Rows or columns as a tensor's index."""
    return slice(indices.start, indices.stop) if isinstance(indices, range) else torch.tensor(indices)


@dataclass(frozen=True)
class Edge:
    """A place where an invertible map folds into ``src`` and ``dst``; see ``DeclaredEdge`` for all that is not here.

    Between q and k an edge has either ``pairs`` or ``free``.

    Attributes:
        src: a projection or a norm.
        dst: the readers of its output: projections, or the norm of k.
        partner: the projection that ``src`` is multiplied with before ``dst``, if any.
    """

    kind: EdgeKind
    src: Projection | Norm
    dst: tuple[Projection | Norm, ...]
    limit: Limit
    heads: Heads | None = None
    offset: float = 0.0
    power: int = 1
    pairs: tuple[tuple[int, int], ...] = ()
    free: tuple[int, ...] = ()
    partner: Projection | None = None
    gathers: bool = False
    shift: bool = False

    @property
    def readers(self) -> tuple[Projection, ...]:
        """The projections in ``dst``."""
        return tuple(dst for dst in self.dst if isinstance(dst, Projection))

    @property
    def positive(self) -> bool:
        """Whether maps must be above 0."""
        return self.limit == "positive"

    @property
    def scales(self) -> bool:
        """Whether a diagonal of positive factors folds."""
        return self.limit != "rotation"

    @property
    def width(self) -> int:
        """Channels of a diagonal map across a norm, heads or channels edge (``heads``: all KV heads together)."""
        return self.src.width if isinstance(self.src, Norm) else self.src.out

    @property
    def layout(self) -> Heads:
        """``heads``, which edges of kind ``heads`` and ``qk`` have."""
        assert self.heads is not None
        return self.heads

    @property
    def gains(self) -> bool:
        """Between q and k: whether the ends are norms, whose gains are scaled."""
        return self.kind == "qk" and isinstance(self.src, Norm)

    @property
    def shared(self) -> bool:
        """Between q and k: whether all heads share the gains of the norms."""
        return self.gains and self.src.width == self.layout.dim  # type: ignore[union-attr]

    @property
    def per_head(self) -> bool:
        """Whether there is one map for each KV head."""
        return self.kind == "heads" or (self.kind == "qk" and not self.shared)

    @property
    def size(self) -> int:
        """Factors of a diagonal map: channels, a head's channels, or a head's pairs or free dimensions."""
        if self.kind == "qk":
            return len(self.pairs) or len(self.free)
        return self.layout.dim if self.kind == "heads" else self.width

    @property
    def diagonal_shape(self) -> tuple[int, ...]:
        """The shape of a diagonal map: ``(kv, size)`` or ``(size,)``."""
        return (self.layout.kv, self.size) if self.per_head else (self.size,)

    def spread(self, map: Tensor) -> Tensor:
        """A value for each of the source's channels as one for each input of a reader: query heads share a KV head's.

        ``(..., kv * dim)`` -> ``(..., query * dim)``; the same tensor where there are no heads.
        """
        if self.heads is None:
            return map
        return map.unflatten(-1, (self.heads.kv, -1)).repeat_interleave(self.heads.group, -2).flatten(-2)

    def pooled(self, values: Tensor, how: Pooling) -> Tensor:
        """A value for each input of a reader as one for each of the source's channels, over heads that share it."""
        if self.heads is None or self.heads.group == 1:
            return values
        split = values.unflatten(-1, (self.heads.kv, self.heads.group, -1))
        pooled: Tensor = getattr(split, how)(-2)
        return pooled.flatten(-2)


def first_edges(edges: Iterable[Edge]) -> list[Edge]:
    """The edges without those whose reader's channels an earlier one scales already."""
    seen: dict[tuple[str, Indices | None], Edge] = {}
    for edge in edges:
        seen.setdefault((edge.readers[0].module, edge.readers[0].columns), edge)
    return list(seen.values())


def resolve(kind: LayerKind, shapes: Mapping[str, torch.Size], index: int) -> tuple[Edge, ...]:
    """The edges of a layer, with the names of a block: ``7.mlp.up_proj`` for layer 7.

    ``shapes`` are those of the layer's parameters as the library stores them, by their names in a block.

    A qk edge with both pairs and free dimensions becomes two, since maps of either are independent.
    """
    edges: list[Edge] = []
    for declared in kind.edges:
        edge = _resolved(declared, shapes, index, kind.transposed)
        if edge.pairs and edge.free:
            edges += [replace(edge, free=()), replace(edge, pairs=())]
        else:
            edges.append(edge)
    return tuple(edges)


def _resolved(edge: DeclaredEdge, shapes: Mapping[str, torch.Size], index: int, transposed: frozenset[str]) -> Edge:
    def end(ref: Ref) -> Projection | Norm:
        part = ref if isinstance(ref, Part) else Part(ref)
        shape = shapes[f"{part.module}.weight"]
        name = f"{index}.{part.module}"
        if len(shape) == 1:
            return Norm(name, shape[0])
        rows = range(shape[1] if part.module in transposed else shape[0])
        own = rows if part.rows is None else part.rows
        return Projection(name, own, own == rows, part.columns)

    partner = None if edge.partner is None else end(edge.partner)
    assert partner is None or isinstance(partner, Projection)
    return Edge(
        edge.kind,
        end(edge.src),
        tuple(map(end, edge.dst)),
        edge.limit,
        edge.heads,
        edge.offset,
        edge.power,
        edge.pairs,
        edge.free,
        partner,
        edge.gathers,
        edge.shift,
    )
