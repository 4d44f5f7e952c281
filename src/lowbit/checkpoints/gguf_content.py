"""What is known of a ``.gguf`` file before its config is made, and what an architecture has to say for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.modeling_gguf_pytorch_utils import TensorProcessor

from lowbit.checkpoints.gguf_metadata import Metadata
from lowbit.checkpoints.gguf_rope import Rope


@dataclass(frozen=True)
class Content:
    """What the config is made of.

    Attributes:
        path: the file, for messages.
        values: metadata by key, without lists of tokens.
        shapes: shapes of all tensors by name, outermost dimension first.
        tables: values of the tensors of rotary divisors, by name.
        tokens: length of the token list, or ``None``.
    """

    path: Path
    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    tables: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tokens: int | None = None


Fields = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How an architecture of llama.cpp becomes a transformers config.

    Attributes:
        model_type: transformers' name.
        rope: see ``gguf_rope``.
        own: adds the fields that only this architecture has to those that all have.
        processor: transformers' class that knows the order of rows and what is added to values.
        head_dim: whether converters always write the width of heads.
        biases: names in the file of linears that may all have biases, by the config's field.
        epsilon: the config's field of the norms' epsilon, and its key.
        experts: module path of the experts within a layer of the model; empty: the architecture has none.
        hybrid: only layers with key/value heads have attention; the file has their number for each layer.
    """

    model_type: str
    rope: Rope
    own: Callable[[Metadata, Content, Fields], Fields]
    processor: type[Any] = TensorProcessor
    head_dim: bool = False
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    experts: str = ""
    hybrid: bool = False
