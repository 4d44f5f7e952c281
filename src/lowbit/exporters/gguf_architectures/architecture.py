"""An architecture of llama.cpp as a value: what its loader reads, how its graph uses it, what it takes for granted.

llama.cpp builds a graph from the architecture's name, the file's keys and the tensors that are there. Whatever it
takes for granted (a scale, the layers with a window, an activation) has no key; a config that says otherwise is
refused, since its tensors would be exact and its function would not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from lowbit.exporters.gguf_heads import head_dim

Facts = dict[str, Any]  # keys without the architecture's name, and their values
PLAIN = ("default", "linear", "yarn")
ANY_ROPE = ("default", "linear", "yarn", "llama3", "longrope")


def no_facts(config: Any) -> Facts:
    """Nothing beyond what all architectures have."""
    return {}


def no_variant(config: Any) -> Architecture | None:
    """One entry for all configs of the class."""
    return None


def nothing(config: Any) -> str | None:
    """No refusal beyond those that the fields of ``Architecture`` imply."""
    return None


def no_warnings(config: Any) -> list[str]:
    """The graph computes what the config says."""
    return []


def as_they_are(config: Any, name: str) -> Tensor | None:
    """Rows, or columns, are in the file as they are in the model."""
    return None


def no_split(config: Any, within: str) -> Mapping[str, int]:
    """Each parameter is in one tensor."""
    return {}


@dataclass(frozen=True)
class Architecture:
    """How models of a class are written for llama.cpp.

    Attributes:
        name: llama.cpp's name, which is the prefix of the keys.
        ropes: types of rotary embeddings that its graph computes, by transformers' names.
        partial_rope: it may rotate a part of each head.
        yarn_betas: its loader reads YaRN's ``beta_fast`` and ``beta_slow``; others compute with 32 and 1.
        any_ramp: a ramp of YaRN's that ends between pairs is written, with a warning; elsewhere it is refused.
        activation: of the MLP, by transformers' name; empty: ``unlike`` says more of it.
        epsilon: the config's field, and the key, of the norms' epsilon.
        adjacent: neighbouring dimensions of a head rotate together where transformers rotates two halves: rows of q
            and k are interleaved within each head.
        square: its loader takes the width of all heads together to be the hidden size.
        head: whether the output matrix may be the embedding (``either``), must be (``tied``), or must not (``own``).
        tensor_scales: its graph multiplies every matrix by the ``.scale`` beside it, which NVFP4 needs.
        facts: keys beyond those that all architectures have, or in their place; a key with ``None`` is left out.
        unlike: what a config requires and the graph does not compute, beginning with the field's name.
        warnings: where the graph computes a little else than the config says, and by how much.
        names: what follows ``blk.N.`` in the file, by what follows the layer's number in the model; only where the
            ``gguf`` package's map has no name, or another one.
        values: what is stored in place of a parameter's value, by the end of its name; the first that fits.
        rows: the order of a parameter's rows in the file, by its name in the model.
        split: the file's tensors, behind ``blk.N.``, that share a parameter's rows in the file's order, and how many
            of them each has, by what follows the layer's number in the model; empty: one tensor has them all.
        variant: another entry for some configs of the class.
        columns: the same of a matrix' columns, which move in whole pieces of ``piece``; ``None``: they stay.
        piece: how many columns move together.
    """

    name: str
    ropes: tuple[str, ...] = PLAIN
    partial_rope: bool = False
    yarn_betas: bool = False
    any_ramp: bool = False
    activation: str = "silu"
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    adjacent: bool = False
    square: bool = False
    head: Literal["either", "tied", "own"] = "either"
    tensor_scales: bool = False
    facts: Callable[[Any], Facts] = no_facts
    unlike: Callable[[Any], str | None] = nothing
    warnings: Callable[[Any], list[str]] = no_warnings
    names: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    rows: Callable[[Any, str], Tensor | None] = as_they_are
    split: Callable[[Any, str], Mapping[str, int]] = no_split
    variant: Callable[[Any], Architecture | None] = no_variant
    columns: Callable[[Any, str], Tensor | None] = as_they_are
    piece: Callable[[Any], int] = head_dim


LAYER_NORM = ("layer_norm_eps", "attention.layer_norm_epsilon")


def plus_one(gain: Tensor) -> Tensor:
    """The gain of a norm that multiplies by ``1 + weight``."""
    return gain + 1.0


def without_channels(kernel: Tensor) -> Tensor:
    """The kernel of a convolution of each channel by itself: ``(channels, 1, width)`` as ``(channels, width)``."""
    return kernel.squeeze(1)


def experts(count: int, used: int, width: int) -> Facts:
    """Keys of a mixture.

    Args:
        count: experts in a layer.
        used: of them for a token.
        width: of an expert's product of gate and up.
    """
    return {"expert_count": count, "expert_used_count": used, "expert_feed_forward_length": width}


def windowed(config: Any) -> list[bool]:
    """Whether each layer has a sliding window."""
    return [kind == "sliding_attention" for kind in config.layer_types]


def has_biases(config: Any, name: str, *fields: str) -> str | None:
    """A refusal for linears whose biases llama.cpp has no tensors for, by the first of ``fields`` that is set."""
    found = next((key for key in fields if getattr(config, key, False)), None)
    return f"{found}; llama.cpp's {name} has no such biases" if found else None


def has_window(config: Any, name: str) -> str | None:
    """A refusal for a sliding window that is shorter than the context, where llama.cpp has none."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) and window is not None and window < config.max_position_embeddings:
        return f"sliding_window {window}; llama.cpp's {name} has none"
    return None


def expected(config: Any, name: str, **fields: Any) -> str | None:
    """A refusal for the first of ``fields`` that is not in the config as llama.cpp takes it for granted.

    >>> from types import SimpleNamespace
    >>> expected(SimpleNamespace(norm_topk_prob=True), "olmoe", norm_topk_prob=False)
    "norm_topk_prob True; llama.cpp's olmoe computes with False"
    """
    for key, value in fields.items():
        found = getattr(config, key, value)
        if found != value:
            return f"{key} {found}; llama.cpp's {name} computes with {value}"
    return None
