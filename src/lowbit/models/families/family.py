"""A declared architecture: what is written down of it, and what its config adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowbit.errors import LowbitError, shown
from lowbit.models.architecture import Architecture, DeclaredEdge, Heads, LayerKind, Ref

WIDEST = 65536  # of a head: pairs of its dimensions are listed, and a config may say anything


@dataclass(frozen=True)
class Family:
    """One declared architecture.

    Attributes:
        name: the name in messages.
        architectures: the values of ``config.architectures`` that the family covers.
        text_models: classes of text models with these layers, which classes with other parts hold. Their list of
            layers and their embedding have the names of ``blocks`` and ``embed``, without ``model.``.
        blocks: module path of the list of decoder layers.
        kind: the structure of layer ``index`` of a model with a config: ``kind(config, index)``.
        head: the output head.
        embed: the token embedding.
        refuse: returns why a config of this family is not supported, or ``None``.
    """

    name: str
    architectures: tuple[str, ...]
    blocks: str
    kind: Callable[[Any, int], LayerKind]
    head: str = "lm_head"
    embed: str = "model.embed_tokens"
    refuse: Callable[[Any], str | None] = lambda config: None
    text_models: tuple[str, ...] = ()

    def architecture(self, config: Any) -> Architecture:
        """The architecture of a model with ``config``."""
        layers = tuple(self.kind(config, index) for index in range(config.num_hidden_layers))
        return Architecture(self.name, self.blocks, self.head, self.embed, layers)


def heads_of(config: Any) -> Heads:
    """The attention's shape from a Hugging Face config.

    Raises:
        LowbitError: it has no shape, or its KV heads do not divide its query heads.
    """
    query = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // query
    heads = Heads(query, config.num_key_value_heads, dim)
    check_heads(heads)
    return heads


def check_heads(heads: Heads) -> None:
    """Refuse a config whose attention has no shape, or whose KV heads do not divide its query heads."""
    for name, value in (("query heads", heads.query), ("key/value heads", heads.kv), ("a head's width", heads.dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LowbitError(f"config.json is invalid: {name} {shown(value)} given; allowed: 1 or more")
    if heads.query % heads.kv:
        raise LowbitError(
            f"config.json is invalid: {heads.query} query heads are not a multiple of {heads.kv} key/value heads"
        )
    if heads.dim > WIDEST:
        raise LowbitError(f"config.json is invalid: a head's width {heads.dim} given; allowed: up to {WIDEST}")


def rotary_dims(config: Any, dim: int, partial: bool = False) -> int:
    """How many leading dimensions of a head the rotary embedding rotates.

    >>> from transformers import Phi3Config
    >>> config = Phi3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4})
    >>> rotary_dims(config, 80, partial=True), rotary_dims(config, 18, partial=True), rotary_dims(config, 80)
    (32, 8, 80)

    Args:
        config: the model's.
        dim: a head's width.
        partial: the class rotates the part that ``partial_rotary_factor`` says; others rotate whole heads whatever
            their config says. Angles come in pairs, so an odd number of dimensions is rounded up.

    Raises:
        LowbitError: the factor is none.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    nested = next((value for value in rope.values() if isinstance(value, dict)), rope)
    factor = nested.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise LowbitError(
            f"config.json is invalid: partial_rotary_factor is {shown(factor)}; allowed: above 0, up to 1"
        )
    if not partial or nested.get("rope_type") == "proportional":  # whose angles of the other dimensions are 0
        return dim
    turned = int(dim * factor)
    return turned + turned % 2


def qk_edge(q: Ref, k: Ref, heads: Heads, rotary: int, gains: bool = False, offset: float = 0.0) -> DeclaredEdge:
    """The edge between q and k (or their norms), where dimensions ``i`` and ``i + rotary / 2`` rotate together.

    >>> edge = qk_edge("q_proj", "k_proj", Heads(query=4, kv=2, dim=6), rotary=4)
    >>> edge.pairs, edge.free, edge.limit
    (((0, 2), (1, 3)), (4, 5), 'matrix')

    Args:
        q, k: the ends.
        heads: the attention's shape.
        rotary: dimensions that are rotated; the others are free.
        gains: the ends are norms; then one factor folds for each pair and for each free dimension.
        offset: the norms multiply by ``offset + weight``.
    """
    half = rotary // 2
    pairs = tuple((i, i + half) for i in range(half))
    free = tuple(range(2 * half, heads.dim))
    limit = "diagonal" if gains else "matrix"
    return DeclaredEdge("qk", q, (k,), limit, heads, offset, pairs=pairs, free=free)  # type: ignore[arg-type]
