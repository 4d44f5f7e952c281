"""The architectures of ``.gguf`` files that are read: one value each, by llama.cpp's name.

https://github.com/ggml-org/llama.cpp/tree/master/conversion (what is written),
https://github.com/ggml-org/llama.cpp/tree/master/src/models (what is computed)
"""

from __future__ import annotations

import math
from typing import Any

from transformers.modeling_gguf_pytorch_utils import (
    Gemma2TensorProcessor,
    GGUFTensor,
    Lfm2TensorProcessor,
    LlamaTensorProcessor,
    TensorProcessor,
)

from lowbit.checkpoints.gguf_content import Architecture, Content, Fields
from lowbit.checkpoints.gguf_metadata import Metadata
from lowbit.checkpoints.gguf_rope import FREQS, LONG, SHORT, Rope, rope_parameters

ATTENTION, MLP = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")
QKV = ATTENTION[:3]
# Layers at which llama.cpp takes a Gemma to be the 27B one, whose attention scale follows from the hidden size.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
PERIODS = {"gemma2": 2, "gemma3": 6, "cohere2": 4}
LAYER_NORM = ("layer_norm_eps", "attention.layer_norm_epsilon")


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


def _granite(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Factors on embeddings, attention, residual stream and logits; 0 stands for one that is not there."""
    if not meta.flag("rope.scaling.finetuned", True):
        raise meta.refusal("rope.scaling.finetuned", "llama.cpp's granite has no rotary embedding then")
    own = 1 / math.sqrt(fields["head_dim"])
    return _plain(meta, content, fields) | {
        "attention_multiplier": meta.number("attention.scale", own, _not_negative) or own,
        "embedding_multiplier": meta.number("embedding_scale", 1.0, _not_negative) or 1.0,
        "residual_multiplier": meta.number("residual_scale", 1.0, _not_negative) or 1.0,
        "logits_scaling": meta.number("logit_scale"),
    }


def _not_negative(value: float) -> bool:
    return value >= 0


def _glm4(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """A part of each head rotates, in transformers' config half of it unless it says all."""
    out = _plain(meta, content, fields)
    return {"rope_parameters": {"partial_rotary_factor": 1.0} | out["rope_parameters"]}


def _cohere2(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Layers without a window have no rotary embedding."""
    out = _plain(meta, content, fields)
    meta.must_equal("rope.freq_base_swa", out["rope_parameters"]["rope_theta"], "transformers' Cohere2")
    window = {"sliding_window": meta.count("attention.sliding_window"), "layer_types": _layer_types(meta, fields)}
    return out | window | {"logit_scale": meta.number("logit_scale")}


def _ministral3(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Queries have a factor that grows with the position; a second number enters YaRN's attention factor."""
    rope = _plain(meta, content, fields)["rope_parameters"]
    below = meta.number("rope.scaling.yarn_log_multiplier", 0.0, _not_negative)
    if below and rope["rope_type"] == "yarn" and rope["factor"] > 1:
        logarithm = 0.1 * math.log(rope["factor"])
        rope["attention_factor"] = rope.get("attention_factor", logarithm + 1) / (below * logarithm + 1)
    length = meta.count("rope.scaling.original_context_length", fields["max_position_embeddings"])
    beta = meta.number("attention.temperature_scale", 0.0, _not_negative)
    return {"rope_parameters": {"original_max_position_embeddings": length} | rope | {"llama_4_scaling_beta": beta}}


def _stablelm(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """llama.cpp computes both halves beside each other where the second has no norm of its own."""
    parallel = "blk.0.ffn_norm.weight" not in content.shapes
    if meta.flag("use_parallel_residual", parallel) != parallel:
        raise meta.refusal("use_parallel_residual", "the tensors of the first layer say otherwise")
    out = _plain(meta, content, fields)
    return {
        "rope_parameters": {"partial_rotary_factor": 1.0} | out["rope_parameters"],
        "use_parallel_residual": parallel,
    }


def _mixture(meta: Metadata) -> Fields:
    """Numbers of experts: all, and those of a token."""
    count = meta.count("expert_count")
    used = meta.count("expert_used_count")
    if used > count:
        raise meta.refusal("expert_used_count", f"the file has {count} experts")
    return {"num_experts": count, "num_experts_per_tok": used}


def _qwen2moe(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Experts in every layer, whose weights are not normalized, beside one with a gate that every token passes."""
    return (
        _plain(meta, content, fields)
        | _mixture(meta)
        | {
            "moe_intermediate_size": meta.count("expert_feed_forward_length"),
            "shared_expert_intermediate_size": meta.count("expert_shared_feed_forward_length"),
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    )


def _qwen3moe(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Experts in every layer, whose weights are normalized."""
    width = meta.count("expert_feed_forward_length")
    layers = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return _plain(meta, content, fields) | _mixture(meta) | {"moe_intermediate_size": width} | layers


def _olmoe(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Experts in every layer as wide as the MLP is said to be, whose weights are not normalized."""
    meta.must_equal("expert_feed_forward_length", fields["intermediate_size"], "llama.cpp's olmoe", unset=0)
    return _plain(meta, content, fields) | _mixture(meta) | {"norm_topk_prob": False, "clip_qkv": None}


def _lfm2(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """Layers without key/value heads have a short convolution; the width of the MLP is as it is said."""
    kv = meta.array("attention.head_count_kv", int, fields["num_hidden_layers"])
    return _plain(meta, content, fields) | {
        "layer_types": ["full_attention" if heads else "conv" for heads in kv],
        "conv_L_cache": meta.count("shortconv.l_cache"),
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,
    }


def _gptneox(meta: Metadata, content: Content, fields: Fields) -> Fields:
    """llama.cpp computes GELU's approximation by tanh, whatever the original model has."""
    if not meta.has("use_parallel_residual"):
        raise meta.refusal("use_parallel_residual", "")
    return _plain(meta, content, fields) | {
        "use_parallel_residual": meta.flag("use_parallel_residual", True),
        "hidden_act": "gelu_pytorch_tanh",
    }


class NeoxProcessor(TensorProcessor):  # type: ignore[misc]  # the library has no annotations
    """Rows of q, k and v: of all heads one after the other in the file, of each head together in the model."""

    def process(self, weights: Any, name: str, **more: Any) -> Any:
        """A tensor in the model's layout."""
        if ".attn_qkv." in name:
            rows = weights.reshape(3, self.config["num_attention_heads"], -1, *weights.shape[1:])
            weights = rows.swapaxes(0, 1).reshape(weights.shape)
        return GGUFTensor(weights, name, {})


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
    "granite": Architecture(
        "granite",
        Rope(base=10000.0, tables=frozenset({FREQS, SHORT, LONG})),
        _granite,
        LlamaTensorProcessor,
        biases=_BIASES | {"mlp_bias": MLP},
    ),
    "mistral3": Architecture(
        "ministral3",
        Rope(base=10000.0, tables=frozenset({FREQS, SHORT, LONG})),
        _ministral3,
        LlamaTensorProcessor,
    ),
    "olmo2": Architecture("olmo2", Rope(), _plain),
    "glm4": Architecture("glm4", Rope(partial=True), _glm4, biases={"attention_bias": QKV}),
    "cohere2": Architecture("cohere2", Rope(frozenset({"default"})), _cohere2, epsilon=LAYER_NORM),
    "stablelm": Architecture(
        "stablelm",
        Rope(base=10000.0, partial=True),
        _stablelm,
        biases={"use_qkv_bias": QKV},
        epsilon=LAYER_NORM,
    ),
    "qwen2moe": Architecture("qwen2_moe", Rope(), _qwen2moe, biases={"qkv_bias": QKV}, experts="mlp.experts"),
    "qwen3moe": Architecture("qwen3_moe", Rope(), _qwen3moe, biases=_BIASES, experts="mlp.experts"),
    "olmoe": Architecture("olmoe", Rope(), _olmoe, biases=_BIASES, experts="mlp.experts"),
    "lfm2": Architecture(
        "lfm2",
        Rope(),
        _lfm2,
        Lfm2TensorProcessor,
        epsilon=("norm_eps", "attention.layer_norm_rms_epsilon"),
        hybrid=True,
    ),
    "gptneox": Architecture(
        "gpt_neox",
        Rope(base=10000.0, partial=True),
        _gptneox,
        NeoxProcessor,
        biases={"attention_bias": ("attn_qkv", "attn_output")},
        epsilon=LAYER_NORM,
    ),
}
