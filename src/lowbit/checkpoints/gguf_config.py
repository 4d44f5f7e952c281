"""The transformers config of a ``.gguf`` file, from its metadata and the names of its tensors.

Every architecture that can be read is one entry of ``ARCHITECTURES``; llama.cpp knows more, and those are refused by
name. What the keys become:

======================================= ====================================================================
key, behind the architecture's name     in the config
======================================= ====================================================================
``vocab_size``, else the token list     ``vocab_size``
``context_length``                      ``max_position_embeddings``
``embedding_length``                    ``hidden_size``
``block_count``                         ``num_hidden_layers``
``feed_forward_length``                 ``intermediate_size``
``attention.head_count``                ``num_attention_heads``
``attention.head_count_kv``             ``num_key_value_heads``
``attention.key_length``                ``head_dim``; ``attention.value_length`` and those of layers with a window
                                        (``_swa``) must be the same
``attention.layer_norm_rms_epsilon``    ``rms_norm_eps``
``attention.scale``                     must be what the model computes with, ``query_pre_attn_scalar`` for Gemma
``attention.sliding_window``            ``sliding_window`` (Gemma, Phi-3; for others it must be 0)
``attention.sliding_window_pattern``    ``layer_types`` (Gemma)
``attn_logit_softcapping``,             the same (Gemma)
``final_logit_softcapping``
``rope.*``                              ``rope_parameters``, see ``gguf_rope``
tensors ``*.bias``                      ``attention_bias``, ``mlp_bias``
tensor ``output.weight``                ``tie_word_embeddings`` is false
``tokenizer.ggml.*_token_id``           ``bos_token_id``, ``eos_token_id``, ``pad_token_id``
======================================= ====================================================================

Keys that converters always write are required, even where llama.cpp has a default: a file that lost one is broken.
Rejected: transformers' own parsing, which ignores most of these keys and keeps defaults of its own instead.

https://github.com/ggml-org/llama.cpp/tree/master/conversion (what is written),
https://github.com/ggml-org/llama.cpp/tree/master/src/models (what is computed)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import Gemma2TensorProcessor, LlamaTensorProcessor, TensorProcessor

from lowbit.checkpoints.gguf_metadata import Metadata
from lowbit.checkpoints.gguf_rope import FREQS, LONG, SHORT, Rope, rope_parameters
from lowbit.errors import LowbitError, shown

ATTENTION, MLP = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")
# Layers at which llama.cpp takes a Gemma to be the 27B one, whose attention scale follows from the hidden size.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
PERIODS = {"gemma2": 2, "gemma3": 6}
ARCHITECTURE = "general.architecture"
NO_TOKEN = (1 << 32) - 1  # llama.h, LLAMA_TOKEN_NULL, as the unsigned integer that files have


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
    """

    model_type: str
    rope: Rope
    own: Callable[[Metadata, Content, Fields], Fields]
    processor: type[Any] = TensorProcessor
    head_dim: bool = False
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _plain(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Rotary parameters and nothing else."""
    rope = ARCHITECTURES[meta.architecture].rope
    context, width = fields["max_position_embeddings"], fields["head_dim"]
    return {"rope_parameters": rope_parameters(meta, rope, width, context, content.tables)}


def _smollm3(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Every fourth layer has no rotary embedding; GGUF has no key for it."""
    layers = range(fields["num_hidden_layers"])
    return _plain(meta, content, fields) | {"no_rope_layers": [int((i + 1) % 4 != 0) for i in layers]}


def _phi3(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """A window in all layers (0 for none), and the original length outside of ``rope_parameters``, too."""
    out = _plain(meta, content, fields)
    rope = out["rope_parameters"]
    original = rope.get("original_max_position_embeddings") or fields["max_position_embeddings"]
    window = meta.count("attention.sliding_window", least=0) or None
    return out | {
        "rope_parameters": {"partial_rotary_factor": 1.0} | rope,
        "original_max_position_embeddings": original,
        "sliding_window": window,
    }


def _gemma2(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Every other layer has a window; attention and logits are capped."""
    out = _plain(meta, content, fields)
    meta.must_equal("rope.freq_base_swa", out["rope_parameters"]["rope_theta"], "transformers' Gemma2")
    caps = {key: meta.number(key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    window = {"sliding_window": meta.count("attention.sliding_window"), "layer_types": _layer_types(meta, fields)}
    return out | caps | window | _gemma_scale(meta, fields)


def _gemma3(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Five of six layers have a window, and rotary frequencies without scaling; 0 stands for no window."""
    full = _plain(meta, content, fields)["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": meta.number("rope.freq_base_swa", 10000.0)}
    cap = meta.number("final_logit_softcapping", 0.0, lambda x: x >= 0) or None
    window = meta.count("attention.sliding_window", least=0)
    types = _layer_types(meta, fields) if window else ["full_attention"] * fields["num_hidden_layers"]
    return {
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "final_logit_softcapping": cap,
        "sliding_window": window or fields["max_position_embeddings"],
        "layer_types": types,
        **_gemma_scale(meta, fields),
    }


def _layer_types(meta: Metadata, fields: Fields) -> list[str]:
    """Whether each layer has a window: an array, or a period of which the last layer has none."""
    key, layers = "attention.sliding_window_pattern", fields["num_hidden_layers"]
    if meta.is_array(key):
        windowed = meta.array(key, bool, layers)
    else:
        period = meta.count(key, PERIODS[meta.architecture], least=0)
        windowed = [period == 0 or (i + 1) % period != 0 for i in range(layers)]
    return ["sliding_attention" if value else "full_attention" for value in windowed]


def _gemma_scale(meta: Metadata, fields: Fields) -> Fields:
    if fields["num_hidden_layers"] == GEMMA_27B[meta.architecture]:
        return {"query_pre_attn_scalar": fields["hidden_size"] // fields["num_attention_heads"]}
    return {"query_pre_attn_scalar": fields["head_dim"]}


_BIASES = {"attention_bias": ATTENTION}
ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        Rope(base=10000.0, tables=frozenset({FREQS, SHORT, LONG})),
        _plain,
        LlamaTensorProcessor,
        biases=_BIASES | {"mlp_bias": MLP},
    ),
    "smollm3": Architecture("smollm3", Rope(), _smollm3, LlamaTensorProcessor, biases=_BIASES | {"mlp_bias": MLP}),
    "qwen2": Architecture("qwen2", Rope(), _plain),
    "qwen3": Architecture("qwen3", Rope(), _plain, biases=_BIASES),
    "phi3": Architecture(
        "phi3",
        Rope(frozenset({"default", "longrope"}), partial=True, tables=frozenset({SHORT, LONG})),
        _phi3,
    ),
    "gemma2": Architecture("gemma2", Rope(base=10000.0), _gemma2, Gemma2TensorProcessor, True, _BIASES),
    "gemma3": Architecture(
        "gemma3_text", Rope(frozenset({"default", "linear"})), _gemma3, Gemma2TensorProcessor, True, _BIASES
    ),
}


def architecture_of(content: Content) -> str:
    """The file's ``general.architecture``. Raises ``LowbitError`` if it cannot be read here."""
    name = content.values.get(ARCHITECTURE)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise LowbitError(
            f"{content.path} has the architecture {shown(name)}; read exactly are only: {known}; use "
            "the model's own folder"
        )
    kind = content.values.get("general.type", "model")
    if kind != "model":
        raise LowbitError(f"{content.path} has general.type = {shown(kind)}: only files of the type 'model' hold one")
    return name


def config_of(content: Content) -> Any:
    """The config. Raises ``LowbitError`` for keys that are missing, invalid, or change what no config expresses.

    Sizes that contradict each other may fail in transformers' own checks instead, with exceptions of many types.
    """
    name = architecture_of(content)
    architecture = ARCHITECTURES[name]
    meta = Metadata(content.path, name, content.values)
    fields = _sizes(meta, architecture, content) | _special_tokens(content)
    fields["tie_word_embeddings"] = "output.weight" not in content.shapes
    for key, linears in architecture.biases.items():
        fields[key] = _has_biases(content, linears, fields["num_hidden_layers"])
    fields |= architecture.own(meta, content, fields)
    divisor = fields["query_pre_attn_scalar" if "query_pre_attn_scalar" in fields else "head_dim"]
    meta.must_equal("attention.scale", 1 / math.sqrt(divisor), "this model", unset=0.0)
    meta.refuse_unread()
    kind = CONFIG_MAPPING[architecture.model_type]
    if not hasattr(kind, "head_dim") and fields["head_dim"] * fields["num_attention_heads"] == fields["hidden_size"]:
        del fields["head_dim"]  # published configs of this type have no such field
    return kind(**fields)


def _sizes(meta: Metadata, architecture: Architecture, content: Content) -> Fields:
    hidden, heads = meta.count("embedding_length"), meta.count("attention.head_count")
    layers = meta.count("block_count")
    if content.shapes.get("token_embd.weight", (0, hidden))[-1] != hidden:
        raise meta.refusal("embedding_length", f"token_embd.weight is {content.shapes['token_embd.weight']}")
    if layers > len(content.shapes):
        # Building a model of a billion layers, even one without storage, would take all memory.
        raise meta.refusal("block_count", f"the file has only {len(content.shapes)} tensors")
    default = None if architecture.head_dim else _default_width(meta, content, hidden, heads)
    width = meta.count("attention.key_length", default)
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        meta.must_equal(key, width, "transformers")
    out = {
        "vocab_size": _vocabulary(meta, content),
        "hidden_size": hidden,
        "intermediate_size": meta.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.count("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": meta.count("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon", accepts=lambda x: 0 < x < 1),
    }
    if heads % out["num_key_value_heads"]:
        raise meta.refusal("attention.head_count_kv", f"{heads} heads cannot share that many evenly")
    return out


def _default_width(meta: Metadata, content: Content, hidden: int, heads: int) -> int:
    """The width of heads without a key; old files of a Llama have the rotated dimensions only, which are all."""
    rows = content.shapes.get("blk.0.attn_q.weight", (0,))[0]
    if meta.architecture == "llama" and meta.has("rope.dimension_count"):
        width = meta.count("rope.dimension_count")
        if rows == heads * width:
            return width
    if hidden % heads:
        raise meta.refusal("attention.head_count", f"it does not divide embedding_length = {hidden}")
    return hidden // heads


def _vocabulary(meta: Metadata, content: Content) -> int:
    """Rows of the embedding: the key, else the tokens, else what the tensor has."""
    rows = content.shapes.get("token_embd.weight", (None,))[0]
    return meta.count("vocab_size", content.tokens or rows)


def _special_tokens(content: Content) -> Fields:
    out: Fields = {}
    rows = content.shapes.get("token_embd.weight", (0,))[0]
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = content.values.get(f"tokenizer.ggml.{name}_token_id")
        value = None if value == NO_TOKEN else value
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < rows):
            raise LowbitError(
                f"{content.path} has tokenizer.ggml.{name}_token_id = {shown(value)}: allowed are ids below {rows}"
            )
        out[f"{key}_token_id"] = value
    return out


def _has_biases(content: Content, linears: Sequence[str], layers: int) -> bool:
    """Whether these linears have biases. Raises ``LowbitError`` if only some do: the config has one switch."""
    expected = {f"blk.{i}.{linear}.bias" for i in range(layers) for linear in linears}
    present = expected & set(content.shapes)
    if present and present != expected:
        raise LowbitError(
            f"{content.path} has the tensor {min(present)}, but not {min(expected - present)}: transformers' model "
            "has biases in all of these linears or in none; use the model's own folder"
        )
    return bool(present)
