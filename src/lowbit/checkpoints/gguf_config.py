"""The transformers config of a ``.gguf`` file, from its metadata and the names of its tensors.

Every architecture that can be read is one entry of ``gguf_sources.ARCHITECTURES``; llama.cpp knows more, and those
are refused by name. What the keys become:

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
``attention.layer_norm_rms_epsilon``    ``rms_norm_eps``; ``attention.layer_norm_epsilon`` ``layer_norm_eps``
``attention.scale``                     must be what the model computes with, ``query_pre_attn_scalar`` for Gemma;
                                        ``attention_multiplier`` for Granite
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
from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_MAPPING

from lowbit.checkpoints.gguf_content import Architecture, Content, Fields
from lowbit.checkpoints.gguf_metadata import Metadata
from lowbit.checkpoints.gguf_sources import ARCHITECTURES
from lowbit.errors import LowbitError, shown

ARCHITECTURE = "general.architecture"
NO_TOKEN = (1 << 32) - 1  # llama.h, LLAMA_TOKEN_NULL, as the unsigned integer that files have


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
    if "attention_multiplier" not in fields:
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
    field, epsilon = architecture.epsilon
    out = {
        "vocab_size": _vocabulary(meta, content),
        "hidden_size": hidden,
        "intermediate_size": meta.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(meta, architecture, heads, layers),
        "head_dim": width,
        "max_position_embeddings": meta.count("context_length"),
        field: meta.number(epsilon, accepts=lambda x: 0 < x < 1),
    }
    if heads % out["num_key_value_heads"]:
        raise meta.refusal("attention.head_count_kv", f"{heads} heads cannot share that many evenly")
    return out


def _kv_heads(meta: Metadata, architecture: Architecture, heads: int, layers: int) -> int:
    """Key/value heads of the layers that have attention, all of which have the same."""
    key = "attention.head_count_kv"
    if not architecture.hybrid:
        return meta.count(key, heads)
    found = {number for number in meta.array(key, int, layers) if number != 0}
    if len(found) != 1 or min(found) < 1:
        raise meta.refusal(key, "allowed is 0 for layers without attention, and one positive number for the others")
    return int(min(found))


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
