"""The declared facts of an architecture, and the matrices of a layer as methods see them.

A family is one value: where the blocks are, which linears a block has, and across which edges an invertible map
folds without changing the function. Nothing here runs a model; the library's own layers do that. Facts come
from the config and the tensors, never from a model's name. An architecture that is not listed is an error.

A family refers to modules by name (``DeclaredEdge``, ``Part``); a block resolves the names into ``Projection``,
``Norm`` and ``Edge``, which know their parameters. Methods use only the resolved types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit.errors import LowbitError, shown

EdgeKind = Literal["norm", "heads", "channels", "qk"]


@dataclass(frozen=True)
class Part:
    """A slice of the output rows of a fused linear, such as ``v`` in ``qkv_proj``."""

    module: str
    part: Literal["q", "k", "v", "gate", "up"]

    def rows(self, heads: Heads, rows: int) -> slice:
        """The slice of the linear's ``rows`` output rows that the part covers.

        >>> Part("qkv", "k").rows(Heads(query=4, kv=2, dim=8, rotary=8), 64)
        slice(32, 48, None)
        """
        q, kv = heads.query * heads.dim, heads.kv * heads.dim
        bounds = {
            "q": (0, q),
            "k": (q, q + kv),
            "v": (q + kv, q + 2 * kv),
            "gate": (0, rows // 2),
            "up": (rows // 2, rows),
        }
        return slice(*bounds[self.part])


Ref = str | Part


@dataclass(frozen=True)
class DeclaredEdge:
    """An edge of a family, by module names within a layer; see ``Edge``."""

    kind: EdgeKind
    src: Ref
    dst: tuple[Ref, ...]
    positive: bool = False


@dataclass(frozen=True)
class Norm:
    """A norm of a block, by name: a gain ``(width,)`` and, for a LayerNorm, a bias."""

    module: str

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
    """One matrix of a layer as methods see it, ``(out, in)``: a linear, or a slice of its output rows.

    Attributes:
        module: name of the linear that holds the matrix.
        rows: the matrix's output rows within the linear's parameter.
        whole: the matrix is the entire parameter.
    """

    module: str
    rows: slice
    whole: bool = True

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
        return int(self.rows.stop - self.rows.start)

    def read(self, params: Mapping[str, Tensor]) -> Tensor:
        """The matrix ``(out, in)``."""
        return params[self.parameter][self.rows]

    def read_bias(self, params: Mapping[str, Tensor]) -> Tensor | None:
        """The bias ``(out,)``, or ``None`` if the linear has none."""
        return params[self.bias][self.rows] if self.bias in params else None

    def change(self, params: MutableMapping[str, Tensor], by: Callable[[Tensor], Tensor]) -> None:
        """Replace the matrix, and its bias if it has one, by ``by`` of them; differentiable where ``by`` is.

        ``by`` takes ``(out, ...)`` and keeps the shape.
        """
        for name in (self.parameter, self.bias):
            if name in params:
                params[name] = self._with_rows_replaced(params[name], by(params[name][self.rows]))

    def change_weight(self, params: MutableMapping[str, Tensor], by: Callable[[Tensor], Tensor]) -> None:
        """``change`` for the matrix alone."""
        params[self.parameter] = self._with_rows_replaced(params[self.parameter], by(self.read(params)))

    def change_bias(self, params: MutableMapping[str, Tensor], by: Callable[[Tensor], Tensor]) -> None:
        """``change`` for the bias alone, which must exist."""
        params[self.bias] = self._with_rows_replaced(params[self.bias], by(params[self.bias][self.rows]))

    def _with_rows_replaced(self, parameter: Tensor, rows: Tensor) -> Tensor:
        if self.whole:
            return rows
        return torch.cat([parameter[: self.rows.start], rows, parameter[self.rows.stop :]])


@dataclass(frozen=True)
class Edge:
    """A place where an invertible map folds into ``src`` and ``dst`` without changing the block's function.

    * ``norm``: ``src`` is a norm, ``dst`` read its output. A diagonal folds (a matrix needs a runtime op).
    * ``heads``: ``src`` is v, ``dst`` is o. One matrix per KV head folds, shared by its query heads.
    * ``channels``: ``src`` -> an elementwise product or a positively homogeneous function -> ``dst``. A diagonal
      folds; it must be positive where ``positive`` is set.
    * ``qk``: ``src`` is q, ``dst`` is k (or their norms). Under a rotary embedding only maps that commute with it
      fold: one scaled rotation per rotary pair. Without one, any matrix per head folds.

    Attributes:
        kind, positive: see above.
        src: a projection or a norm.
        dst: the readers of its output: projections, or the norm of k.
        partner: of a ``channels`` edge, the projection that ``src`` is multiplied with before ``dst``, if any.
    """

    kind: EdgeKind
    src: Projection | Norm
    dst: tuple[Projection | Norm, ...]
    positive: bool = False
    partner: Projection | None = None

    @property
    def readers(self) -> tuple[Projection, ...]:
        """The projections in ``dst``."""
        return tuple(dst for dst in self.dst if isinstance(dst, Projection))

    @property
    def width(self) -> int:
        """Channels of a diagonal map across an edge between projections (for ``heads``: all KV heads together)."""
        assert isinstance(self.src, Projection)
        return self.src.out


@dataclass(frozen=True)
class Heads:
    """The attention's shape.

    Attributes:
        query: number of query heads.
        kv: number of key/value heads; it divides ``query``.
        dim: width of a head (``dim * query`` need not be the hidden size).
        rotary: number of leading dimensions of a head that the rotary embedding rotates; 0 without one. Dimension
            ``i`` is paired with ``i + rotary / 2``.
    """

    query: int
    kv: int
    dim: int
    rotary: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query // self.kv


@dataclass(frozen=True)
class Family:
    """One declared architecture.

    Attributes:
        name: the name in messages.
        architectures: the values of ``config.architectures`` that the family covers.
        blocks: module path of the list of decoder layers.
        linears: a layer's linears in execution order, grouped by shared input.
        edges: see ``Edge``; module names are relative to a layer.
        heads: reads the attention's shape from a config.
        attention: a layer's attention module.
        head: the output head.
        embed: the token embedding.
        norm_offset: a norm multiplies by ``norm_offset + weight``.
        qk_norm_per_head: the qk edge's ``src`` and ``dst`` are norms over a head's dimensions, shared by all heads.
        flat_mlp: the layer passes ``(tokens, hidden)`` to its MLP instead of ``(sequences, length, hidden)``.
        refuse: returns why a config of this family is not supported, or ``None``.
    """

    name: str
    architectures: tuple[str, ...]
    blocks: str
    linears: tuple[tuple[str, ...], ...]
    edges: tuple[DeclaredEdge, ...]
    heads: Callable[[Any], Heads]
    attention: str = "self_attn"
    head: str = "lm_head"
    embed: str = "model.embed_tokens"
    norm_offset: float = 0.0
    qk_norm_per_head: bool = False
    flat_mlp: bool = False
    refuse: Callable[[Any], str | None] = lambda config: None


def rotary_heads(config: Any) -> Heads:
    """The attention's shape from the Hugging Face config of a model with rotary embeddings."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    nested = next((value for value in rope.values() if isinstance(value, dict)), rope)
    factor = nested.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise LowbitError(
            f"config.json is invalid: partial_rotary_factor is {shown(factor)}; allowed: above 0, up to 1"
        )
    return Heads(config.num_attention_heads, config.num_key_value_heads, dim, int(dim * factor))


def check_heads(heads: Heads) -> None:
    """Refuse a config whose attention has no shape, or whose KV heads do not divide its query heads."""
    for name, value in (("query heads", heads.query), ("key/value heads", heads.kv), ("a head's width", heads.dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LowbitError(f"config.json is invalid: {name} {shown(value)} given; allowed: 1 or more")
    if heads.query % heads.kv:
        raise LowbitError(
            f"config.json is invalid: {heads.query} query heads are not a multiple of {heads.kv} key/value heads"
        )
