"""A small config from a model's own: sizes are lowered, nothing else changes.

Activations, biases, norms, the pattern of layers and everything else that decides which maps fold stay as they are.
Two small sizes exist, so that a number measured at both can be carried to the real one; within a size no two
widths are equal, so that none is taken for another, and no product of heads and their width is the same at both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.errors import LowbitError, one_line
from lowbit.models.build import text_config
from lowbit.models.discovery.rotary import HEADS, lower_rotary

Size = Literal[0, 1]
TOKENS = 18  # of a sequence; no width of a head or a layer equals it
VOCABULARY = 128
MOST_LAYERS = 8

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks")
_KV = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
# Values for both sizes by what a field measures, then the fields' names.
_OF_EXPERTS: tuple[tuple[tuple[int, int], str], ...] = (
    ((4, 4), "num_experts num_local_experts n_routed_experts moe_num_experts"),
    ((2, 2), "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts num_selected_experts moe_top_k"),
    ((1, 1), "n_group num_expert_group topk_group zero_expert_num"),
)
_FIELDS: tuple[tuple[tuple[int, int], str], ...] = (
    ((64, 96), "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width"),
    ((64, 96), "backbone_hidden_size hidden_size_global out_hidden_size input_embedding_size output_embedding_size"),
    ((64, 96), "adapter_in_dim adapter_input_size attention_hidden_size"),
    ((4, 12), " ".join(HEADS)),
    ((16, 8), "head_dim dim_head d_head attention_head_size kv_channels"),
    ((48, 56), "intermediate_size ffn_dim n_inner dff dim_ff ffn_hidden_size d_inner feed_forward_size block_ff_dim"),
    ((48, 56), "decoder_ffn_dim encoder_ffn_dim mlp_dim dense_intermediate_size intermediate_size_mlp"),
    ((24, 40), "moe_intermediate_size expert_ffn_hidden_size"),
    ((40, 24), "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size"),
    ((40, 24), "moe_shared_expert_intermediate_size"),
    *_OF_EXPERTS,
    ((1, 1), "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    ((32, 40), "q_lora_rank"),
    ((24, 32), "kv_lora_rank o_lora_rank"),
    ((12, 20), "qk_nope_head_dim"),
    ((8, 16), "qk_rope_head_dim"),
    ((20, 36), "qk_head_dim"),
    ((16, 24), "v_head_dim"),
    ((16, 32), "index_head_dim"),
    ((2, 2), "index_n_heads"),
    ((32, 32), "index_topk sliding_window sliding_window_size window_size attention_window_size local_attention"),
    ((32, 32), "attention_chunk_size local_attention_window_len index_block_size keep_window_size"),
    ((16, 16), "mamba_chunk_size chunk_size block_size mamba_d_state ssm_state_size state_size"),
    ((2, 3), "linear_num_key_heads"),
    ((4, 6), "linear_num_value_heads linear_num_heads"),
    ((16, 8), "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    ((8, 6), "rotary_dim"),
    ((8, 8), "time_step_rank mamba_dt_rank laurel_rank adapter_rank hc_lowrank loop_gate_rank rel_extent"),
    ((16, 24), "hidden_size_per_layer_input global_head_dim swa_head_dim pronunciation_embed_dim shape_embed_dim"),
    ((4, 12), "swa_num_attention_heads"),
    ((2, 3), "swa_num_key_value_heads num_global_key_value_heads"),
    ((16, 24), "router_hidden_size"),
    ((16, 16), "query_pre_attn_scalar"),
    ((128, 128), "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length"),
    ((128, 128), "max_target_positions max_source_positions original_max_position_embeddings"),
    ((128, 128), "codebook_size audio_vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    ((128, 128), "pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base num_mel_bins"),
    ((2, 2), "depth split_ngram_parts num_quantizers"),
)
_VALUES = {name: values for values, names in _FIELDS for name in names.split()}
_EXPERTS = frozenset(name for _, names in _OF_EXPERTS for name in names.split())
# Read in place of 0 and None: what a library derives from them at the small size could break.
_ALSO_NONE = ("head_dim", *_KV, "num_experts_per_tok")
_DROPPED = ("model_type", "transformers_version", "per_layer_config", "auto_map", "quantization_config")
_INDICES = ("mlp_only_layers", "full_attn_idxs", "moe_layers", "hybrid_layer_ids", "cross_attention_layers")


@dataclass(frozen=True)
class Layers:
    """Which layers a small model keeps.

    Attributes:
        each: so many of each combination that lists by layer show; layers of some models share what the first holds.
        first: if given, the first so many in place of those: of models whose layers alternate without a list.
    """

    each: int = 1
    first: int | None = None


def shrunk(config: Any, size: Size = 0, layers: Layers = Layers()) -> Any:
    """A config of the same class with small sizes.

    Args:
        config: the model's Hugging Face config; it stays as it is.
        size: which of the two small sizes.
        layers: which layers to keep.

    Raises:
        LowbitError: the class does not take the lowered values.
    """
    lowered = _text_changed(config, lambda fields: lower(fields, size, layers))
    try:
        return type(config)(**lowered)
    except Exception as error:  # a config class validates by any exception
        raise LowbitError(f"{type(config).__name__} takes no small sizes: {one_line(error)}") from error


def lower(fields: Mapping[str, Any], size: Size, layers: Layers = Layers()) -> dict[str, Any]:
    """The fields of a config with sizes lowered, also in configs within it.

    >>> lower({"hidden_size": 4096, "hidden_act": "silu", "num_attention_heads": 32, "head_dim": None}, 0)
    {'hidden_size': 64, 'hidden_act': 'silu', 'num_attention_heads': 4, 'head_dim': 16}
    """
    out = {name: value for name, value in fields.items() if name not in _DROPPED}
    for name, value in out.items():
        if isinstance(value, dict) and name.endswith("_config"):
            out[name] = lower(value, size, layers) | {k: v for k, v in value.items() if k == "model_type"}
        elif name in _VALUES and (_is_size(value) or (value is None and name in _ALSO_NONE)):
            out[name] = min(_VALUES[name][size], value) if name in _EXPERTS and value else _VALUES[name][size]
        elif name in _VALUES and isinstance(value, list) and value and all(map(_is_size, value)):
            out[name] = [_VALUES[name][size]] * len(value)  # one for each layer
    _key_value_heads(fields, out, size)
    _latent_attention(fields, out, size)
    _state_space(out, size)
    _wide_attention(fields, out)
    lower_rotary(fields, out, size)
    _special_tokens(out)
    _layers(fields, out, layers)
    _fewer_experts(out)
    _overrides_by_layer(fields, out, size)
    return out


def fewer_layers(config: Any, layers: Layers = Layers()) -> Any:
    """A config of the model's own widths, with a small vocabulary, few experts and the layers that ``lower`` keeps.

    Raises:
        LowbitError: the class does not take it.
    """

    def shortened(fields: Mapping[str, Any]) -> dict[str, Any]:
        out = {name: value for name, value in fields.items() if name not in _DROPPED}
        _special_tokens(out)
        _layers(fields, out, layers)
        _fewer_experts(out)
        _overrides_by_layer(fields, out)
        return out

    return _rebuilt(config, shortened, "layers")


def fewer_experts(config: Any) -> Any:
    """A config of the model's own with few experts and all else as it is: a layer of a mixture that fits memory.

    Raises:
        LowbitError: the class does not take it.
    """

    def reduced(fields: Mapping[str, Any]) -> dict[str, Any]:
        out = {name: value for name, value in fields.items() if name not in _DROPPED}
        _fewer_experts(out)
        _overrides_by_layer(fields, out)
        return out

    return _rebuilt(config, reduced, "experts")


def _rebuilt(config: Any, change: Callable[[Mapping[str, Any]], dict[str, Any]], fewer: str) -> Any:
    """A config of the same class whose text model's fields are changed; ``fewer`` says in an error what of."""
    out = _text_changed(config, change)
    try:
        return type(config)(**out)
    except Exception as error:
        raise LowbitError(f"{type(config).__name__} takes no fewer {fewer}: {one_line(error)}") from error


def _fewer_experts(out: dict[str, Any]) -> None:
    """Four experts, two for a token, in one group; a list has a number for each layer."""
    for name in _EXPERTS & out.keys():
        value, small = out[name], _VALUES[name][0]
        if _is_size(value):
            out[name] = min(value, small)
        elif isinstance(value, list) and all(map(_is_size, value)):
            out[name] = [min(one, small) for one in value]


def _text_changed(config: Any, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """The fields of a config, changed; of one with other parts than a text model, the text model's alone."""
    fields, text = config.to_dict(), text_config(config)
    name = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    if name is None:
        return change(fields)
    out = {key: value for key, value in fields.items() if key not in _DROPPED}
    _special_tokens(out)
    return out | {name: change(fields[name]) | {k: v for k, v in fields[name].items() if k == "model_type"}}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _key_value_heads(fields: Mapping[str, Any], out: dict[str, Any], size: Size) -> None:
    """One, as many as query heads, or some between, as the model has it."""
    heads = next((fields[name] for name in HEADS if fields.get(name)), None)
    for name in _KV:
        if name in fields:
            real = fields[name]
            small = {1: 1, heads: (4, 12)[size]}.get(real, (2, 3)[size])
            out[name] = small if isinstance(real, int) or real is None else real


def _latent_attention(fields: Mapping[str, Any], out: dict[str, Any], size: Size) -> None:
    """With latent attention every query head has a key, and ``head_dim`` sizes the rotary embedding."""
    if not fields.get("kv_lora_rank") or "qk_rope_head_dim" not in fields:
        return
    out.update({name: out["qk_rope_head_dim"] for name in ("head_dim",) if name in fields})
    out.update({name: (4, 12)[size] for name in _KV if name in fields})


def _state_space(out: dict[str, Any], size: Size) -> None:
    """Heads times their width equals the inner width, of which a config knows the factor only."""
    hidden = out.get("hidden_size")
    for factor, heads, width in (
        ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
        ("expand", "mamba_num_heads", "mamba_head_dim"),
        ("expand", "num_heads", "head_dim"),
        ("mamba_expand", "n_mamba_heads", "mamba_headdim"),
    ):
        if hidden and factor in out and heads in out and ("mamba" in heads or "state_size" in out):
            inner = int(out[factor] * hidden)
            out[width], out[heads] = 16, inner // 16
    if "mamba_d_ssm" in out:
        out["mamba_d_ssm"] = 16 * out["mamba_n_heads"]
    for groups in ("n_groups", "mamba_n_groups"):  # they divide the heads: 8 or 12
        if _is_size(out.get(groups)):
            out[groups] = min(4, out[groups])


def _wide_attention(fields: Mapping[str, Any], out: dict[str, Any]) -> None:
    """Attention on twice the hidden size, as of a layer that reads the embedding too."""
    if _is_size(fields.get("attention_hidden_size")) and "num_attention_heads" in out:
        out["attention_hidden_size"] = out["hidden_size"] * fields["attention_hidden_size"] // fields["hidden_size"]
        out["attention_head_dim"] = out["attention_hidden_size"] // out["num_attention_heads"]


def _special_tokens(out: dict[str, Any]) -> None:
    """Ids below the small vocabulary."""
    for name, value in out.items():
        if name.endswith(("vocab_size", "vocab_size_per_layer_input")) and _is_size(value):
            out[name] = VOCABULARY
        elif name.endswith(("_token_id", "_token_index", "_token_ids")):
            out[name] = _below(value)


def _below(value: Any) -> Any:
    if isinstance(value, list):
        return [_below(one) for one in value]
    return value % VOCABULARY if isinstance(value, int) and not isinstance(value, bool) else value


def _layers(fields: Mapping[str, Any], out: dict[str, Any], kept: Layers) -> None:
    """Fewer layers, and the entries of lists by layer that go with them."""
    names = [name for name in _LAYERS if _is_size(fields.get(name))]
    if not names:
        return
    count = fields[names[0]]
    lists = [name for name, value in fields.items() if isinstance(value, list | tuple) and len(value) == count]
    lists = [name for name in lists if name not in _INDICES and count > 1]
    chosen = kept_layers([fields[name] for name in lists], count, kept.each)
    if kept.first is not None:
        chosen = list(range(min(kept.first, count)))
    for name in lists:
        out[name] = [out.get(name, fields[name])[index] for index in chosen]
    for name in _INDICES:
        if isinstance(fields.get(name), list | tuple):
            out[name] = [at for at, index in enumerate(chosen) if index in fields[name]]
    out.update(dict.fromkeys(names, len(chosen)))
    for name in ("num_kv_shared_layers", "max_window_layers"):
        if _is_size(fields.get(name)):
            out[name] = min(out[names[0]] // 2, fields[name])


def kept_layers(lists: Sequence[Sequence[Any]], count: int, each: int = 1) -> list[int]:
    """Indices of the layers that a small model keeps: the first ``each`` of each combination, up to ``MOST_LAYERS``.

    >>> kept_layers([["slide", "slide", "full", "slide"], ["dense", "moe", "moe", "moe"]], 4)
    [0, 1, 2, 3]
    >>> kept_layers([["slide"] * 5 + ["full"]], 6)
    [0, 1, 4, 5]
    """
    seen: dict[str, list[int]] = {}
    for index in range(count):
        seen.setdefault(repr([one[index] for one in lists]), []).append(index)
    chosen = sorted(index for own in seen.values() for index in own[:each])[:MOST_LAYERS]
    if len(seen) == 1:
        return list(range(min(2, count)))
    rest = [index for index in range(count) if index not in chosen]
    wanted = min(4, count) - len(chosen)
    early = rest[:1] if wanted > 0 else []
    late = [index for index in reversed(rest) if index not in early][: max(wanted - len(early), 0)]
    return sorted(chosen + early + late)


def _overrides_by_layer(fields: Mapping[str, Any], out: dict[str, Any], size: Size | None = None) -> None:
    """Configs whose layers differ in width store what differs; the constructor takes it by other names.

    Without a size, the real values are taken.
    """
    stored = [layer for layer in (fields.get("per_layer_config") or {}).values() if isinstance(layer, dict)]
    for name, passed, small in (
        ("head_dim", "global_head_dim", (32, 16)),
        ("num_key_value_heads", "num_global_key_value_heads", (1, 3)),
    ):
        values = [layer[name] for layer in stored if name in layer]
        if values:
            out[passed] = values[0] if size is None else small[size]
