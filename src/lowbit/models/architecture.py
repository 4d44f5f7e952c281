"""What has to be known about an architecture, as data, and how methods see its matrices.

A family is one value: where the blocks are, which linears a block has, and along which edges an invertible map
can move without changing the function. Nothing here runs a model; the library's own layers do that. Facts come
from the config and the tensors, never from a model's name, and an architecture that is not listed is an error.

A family declares with names (``DeclaredEdge``, ``Part``); a block resolves them into ``Projection``, ``Norm`` and
``Edge``, which know their parameters. Methods see these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit.errors import LowbitError

EdgeKind = Literal["norm", "heads", "channels", "qk"]


@dataclass(frozen=True)
class Part:
    """Some output rows of a linear that computes several things at once, such as ``v`` in a fused ``qkv_proj``."""

    module: str
    part: Literal["q", "k", "v", "gate", "up"]

    def rows(self, heads: Heads, rows: int) -> slice:
        """Which of the linear's ``rows`` output rows these are.

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
    """An edge of a family, by names within a layer; see ``Edge``."""

    kind: EdgeKind
    src: Ref
    dst: tuple[Ref, ...]
    positive: bool = False


@dataclass(frozen=True)
class Norm:
    """A norm of a block, by its name: a gain ``(width,)`` and perhaps a bias."""

    module: str

    @property
    def parameter(self) -> str:
        """The gain's name."""
        return f"{self.module}.weight"

    @property
    def bias(self) -> str:
        """The bias's name; LayerNorms have one."""
        return f"{self.module}.bias"


@dataclass(frozen=True)
class Projection:
    """One matrix of a layer as methods see it, ``(out, in)``: a linear, or some output rows of one.

    Attributes:
        module: the linear that holds it.
        rows: its output rows within the linear's parameter.
        whole: they are all of the parameter's rows.
    """

    module: str
    rows: slice
    whole: bool = True

    @property
    def parameter(self) -> str:
        """The parameter that holds the matrix."""
        return f"{self.module}.weight"

    @property
    def bias(self) -> str:
        """The linear's bias, which need not be there."""
        return f"{self.module}.bias"

    @property
    def out(self) -> int:
        """Output channels."""
        return int(self.rows.stop - self.rows.start)

    def read(self, params: Mapping[str, Tensor]) -> Tensor:
        """The matrix ``(out, in)``."""
        return params[self.parameter][self.rows]

    def read_bias(self, params: Mapping[str, Tensor]) -> Tensor | None:
        """The bias ``(out,)``, or ``None``."""
        return params[self.bias][self.rows] if self.bias in params else None

    def change(self, params: MutableMapping[str, Tensor], by: Callable[[Tensor], Tensor]) -> None:
        """Put ``by`` of the matrix, and of its bias where it has one, in their places; differentiable as ``by`` is.

        ``by`` takes ``(out, ...)`` and keeps the shape.
        """
        for name in (self.parameter, self.bias):
            if name in params:
                params[name] = self._replaced(params[name], by(params[name][self.rows]))

    def change_weight(self, params: MutableMapping[str, Tensor], by: Callable[[Tensor], Tensor]) -> None:
        """The same for the matrix alone."""
        params[self.parameter] = self._replaced(params[self.parameter], by(self.read(params)))

    def change_bias(self, params: MutableMapping[str, Tensor], by: Callable[[Tensor], Tensor]) -> None:
        """The same for the bias alone, which must be there."""
        params[self.bias] = self._replaced(params[self.bias], by(params[self.bias][self.rows]))

    def _replaced(self, parameter: Tensor, rows: Tensor) -> Tensor:
        if self.whole:
            return rows
        return torch.cat([parameter[: self.rows.start], rows, parameter[self.rows.stop :]])


@dataclass(frozen=True)
class Edge:
    """A place where an invertible map moves from ``src`` into ``dst`` and leaves the block's function alone.

    * ``norm``: ``src`` is a norm, ``dst`` read its output. A diagonal merges (a matrix would stay online).
    * ``heads``: ``src`` is v, ``dst`` is o. One matrix per KV head merges, spread over its query heads.
    * ``channels``: ``src`` -> an elementwise product or a positively homogeneous function -> ``dst``. A diagonal
      merges; it must be positive where ``positive`` is set.
    * ``qk``: ``src`` is q, ``dst`` is k (or their norms). Under a rotary embedding only maps that commute with it
      merge: one scaled rotation for each rotary pair. Without one, any matrix per head merges.

    Attributes:
        kind, positive: see above.
        src: a projection or a norm.
        dst: what reads it: projections, or the norm of k.
        partner: of a ``channels`` edge, the projection that ``src`` is multiplied with before ``dst``, if any.
    """

    kind: EdgeKind
    src: Projection | Norm
    dst: tuple[Projection | Norm, ...]
    positive: bool = False
    partner: Projection | None = None

    @property
    def readers(self) -> tuple[Projection, ...]:
        """``dst`` as projections, for edges whose map reaches matrices."""
        return tuple(dst for dst in self.dst if isinstance(dst, Projection))

    @property
    def width(self) -> int:
        """Channels of a diagonal map over an edge between projections (for ``heads``: all KV heads together)."""
        assert isinstance(self.src, Projection)
        return self.src.out


@dataclass(frozen=True)
class Heads:
    """The attention's shape.

    Attributes:
        query: number of query heads.
        kv: number of key/value heads; it divides ``query``.
        dim: width of a head (``dim * query`` need not be the hidden size).
        rotary: how many leading dimensions of a head the rotary embedding turns; 0 without one. Dimension ``i``
            is paired with ``i + rotary / 2``.
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
    """One architecture.

    Attributes:
        name: what messages call it.
        architectures: values of ``config.architectures`` that it covers.
        blocks: module path of the list of decoder layers.
        linears: a layer's linears in execution order, grouped by shared input.
        edges: see ``Edge``; names are relative to a layer.
        heads: reads the attention's shape from a config.
        attention: a layer's attention module.
        head: the output head.
        embed: the token embedding.
        norm_offset: a norm multiplies by ``norm_offset + weight``.
        qk_norm_per_head: the qk edge's ``src`` and ``dst`` are norms over a head's dimensions, shared by heads.
        flat_mlp: the layer hands its MLP ``(tokens, hidden)`` instead of ``(sequences, length, hidden)``.
        refuse: returns why a config of this family cannot be handled, or ``None``.
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
    """The attention's shape of a model with rotary embeddings, from its Hugging Face config."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    nested = next((value for value in rope.values() if isinstance(value, dict)), rope)
    factor = nested.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    return Heads(config.num_attention_heads, config.num_key_value_heads, dim, int(dim * factor))


def check_heads(heads: Heads) -> None:
    """Refuse a config whose numbers of heads do not divide."""
    if heads.query % heads.kv:
        raise LowbitError(f"{heads.query} query heads are no multiple of {heads.kv} key/value heads: broken config")
