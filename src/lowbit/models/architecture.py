"""What has to be known about an architecture, as data.

A family is one value: where the blocks are, which linears a block has, and along which edges an invertible map
can move without changing the function. Nothing here runs a model; the library's own layers do that. Facts come
from the config and the tensors, never from a model's name, and an architecture that is not listed is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.errors import LowbitError


@dataclass(frozen=True)
class Part:
    """Some output rows of a linear that computes several things at once, such as ``v`` in a fused ``qkv_proj``."""

    module: str
    part: Literal["q", "k", "v", "gate", "up"]


Ref = str | Part


def module_of(ref: Ref) -> str:
    """The linear or norm that a reference points into."""
    return ref.module if isinstance(ref, Part) else ref


@dataclass(frozen=True)
class Edge:
    """A place where an invertible map moves from ``src`` into ``dst`` and leaves the block's function alone.

    * ``norm``: ``src`` is a norm, ``dst`` read its output. A diagonal merges (a matrix would stay online).
    * ``heads``: ``src`` is v, ``dst`` is o. One matrix per KV head merges, spread over its query heads.
    * ``channels``: ``src`` -> an elementwise product or a positively homogeneous function -> ``dst``. A diagonal
      merges; it must be positive where ``positive`` is set.
    * ``qk``: ``src`` is q, ``dst`` is k (or their norms). Under a rotary embedding only maps that commute with it
      merge: one scaled rotation for each rotary pair. Without one, any matrix per head merges.
    """

    kind: Literal["norm", "heads", "channels", "qk"]
    src: Ref
    dst: tuple[Ref, ...]
    positive: bool = False


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
    edges: tuple[Edge, ...]
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
