"""Architectures that are not declared in the package, written down by hand for tests: layers of many shapes.

========== ========================================================================================================
gpt-neox   q, k and v interleaved head by head in one linear; a rotary embedding of some dimensions; parallel halves
gpt2       matrices stored as (in, out); q, k and v fused; no rotary embedding
lfm2       layers with a gated short convolution beside layers with attention, whose norms on q and k have gains
nemotron   norms that multiply by 1 + w; a squared ReLU, through which a scale s goes as s**2
cohere     one norm for attention and MLP; neighbouring dimensions rotate together
olmo2      norms behind each half only; norms over all heads of q and of k
bloom      layers that return tuples and take an argument with rows for each sequence
qwen2-moe  experts beside one that every token reaches, whose output has a gate of its own
gpt-oss    experts that are stored as (in, out), gate and up interleaved, with biases and a clamp between up and down
========== ========================================================================================================
"""

from __future__ import annotations

from typing import Any

from transformers import (
    BloomConfig,
    CohereConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    NemotronConfig,
    Olmo2Config,
    Qwen2MoeConfig,
)

from lowbit.models.architecture import DeclaredEdge, ExpertLinear, Experts, Heads, LayerKind, Part
from lowbit.models.experts import gated_experts
from lowbit.models.families.family import Family, heads_of, qk_edge
from lowbit.models.families.llama import DOWN, GATE, NORMS, UP, K, O, Q, V, heads_and_channels
from lowbit.models.families.mixtures import expert_edges
from tiny import COMMON, VOCAB

HEADS = Heads(query=4, kv=2, dim=16)
EVERY = Heads(query=4, kv=4, dim=16)  # a key/value head for each query head
SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def interleaved(name: str, at: int) -> Part:
    """The rows of q (at 0), k (1) or v (2) where a linear holds q, k and v of head 0, then those of head 1, ..."""
    rows = [(3 * head + at) * EVERY.dim + i for head in range(EVERY.kv) for i in range(EVERY.dim)]
    return Part(name, rows=tuple(rows), name="qkv"[at])


def gpt_neox_layer(config: Any, index: int) -> LayerKind:
    """Parallel halves, each with a norm of its own; 4 of 16 dimensions rotate."""
    qkv, out, up, down = "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    q, k, v = (interleaved(qkv, at) for at in range(3))
    edges = (
        DeclaredEdge("norm", "input_layernorm", (qkv,), gathers=True, shift=True),
        DeclaredEdge("norm", "post_attention_layernorm", (up,), gathers=True, shift=True),
        DeclaredEdge("heads", v, (out,), "matrix", EVERY, shift=True),
        qk_edge(q, k, EVERY, rotary=4),
    )
    return LayerKind(((qkv,), (out,), (up,), (down,)), edges, attention="attention")


def gpt2_layer(config: Any, index: int) -> LayerKind:
    """Matrices stored as (in, out)."""
    qkv, out, up, down = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
    q, k, v = (Part(qkv, rows=range(64 * i, 64 * i + 64), name="qkv"[i]) for i in range(3))
    edges = (
        DeclaredEdge("norm", "ln_1", (qkv,), gathers=True, shift=True),
        DeclaredEdge("norm", "ln_2", (up,), gathers=True, shift=True),
        DeclaredEdge("heads", v, (out,), "matrix", EVERY, shift=True),
        qk_edge(q, k, EVERY, rotary=0),
    )
    linears = ((qkv,), (out,), (up,), (down,))
    return LayerKind(linears, edges, attention="attn", transposed=frozenset((qkv, out, up, down)))


def lfm2_layer(config: Any, index: int) -> LayerKind:
    """A convolution ``C * conv(B * x)``, of which ``in_proj`` computes B, C and x; or attention."""
    mlp = tuple(f"feed_forward.{name}" for name in ("w1", "w3", "w2"))
    common = (
        DeclaredEdge("norm", "ffn_norm", mlp[:2], gathers=True),
        DeclaredEdge("channels", mlp[1], mlp[2:], partner=mlp[0], gathers=True),
    )
    if config.layer_types[index] == "conv":
        thirds = (Part("conv.in_proj", range(64 * i, 64 * i + 64), name="BCx"[i]) for i in range(3))
        edges = (
            DeclaredEdge("norm", "operator_norm", ("conv.in_proj",), gathers=True),
            *(DeclaredEdge("channels", third, ("conv.out_proj",)) for third in thirds),
            *common,
        )
        return LayerKind((("conv.in_proj",), ("conv.out_proj",), mlp[:2], mlp[2:]), edges, attention=None)
    out = "self_attn.out_proj"
    edges = (
        DeclaredEdge("norm", "operator_norm", (Q, K, V), gathers=True),
        DeclaredEdge("heads", V, (out,), "matrix", HEADS),
        qk_edge("self_attn.q_layernorm", "self_attn.k_layernorm", HEADS, HEADS.dim, gains=True),
        *common,
    )
    return LayerKind(((Q, K, V), (out,), mlp[:2], mlp[2:]), edges)


def nemotron_layer(config: Any, index: int) -> LayerKind:
    """No gate; half of each head rotates."""
    edges = (
        DeclaredEdge("norm", "input_layernorm", (Q, K, V), offset=1.0),
        DeclaredEdge("norm", "post_attention_layernorm", (UP,), offset=1.0),
        DeclaredEdge("heads", V, (O,), "matrix", HEADS),
        DeclaredEdge("channels", UP, (DOWN,), "positive", power=2),
        qk_edge(Q, K, HEADS, rotary=8),
    )
    return LayerKind(((Q, K, V), (O,), (UP,), (DOWN,)), edges)


def cohere_layer(config: Any, index: int) -> LayerKind:
    """Five linears read one norm, which has no bias."""
    pairs = tuple((i, i + 1) for i in range(0, HEADS.dim, 2))
    edges = (
        DeclaredEdge("norm", "input_layernorm", (Q, K, V, GATE, UP), gathers=True),
        *heads_and_channels(heads_of(config)),
        DeclaredEdge("qk", Q, (K,), "matrix", HEADS, pairs=pairs),
    )
    return LayerKind(((Q, K, V), (O,), (GATE, UP), (DOWN,)), edges)


def olmo2_layer(config: Any, index: int) -> LayerKind:
    """Attention and MLP read the residual stream itself, so no edge crosses a norm."""
    qk = qk_edge("self_attn.q_norm", "self_attn.k_norm", HEADS, HEADS.dim, gains=True)
    return LayerKind(((Q, K, V), (O,), (GATE, UP), (DOWN,)), (*heads_and_channels(HEADS), qk))


def bloom_layer(config: Any, index: int) -> LayerKind:
    """As GPT-NeoX one half after the other, with biases for the positions in place of a rotary embedding."""
    qkv, out, up, down = (
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
    q, k, v = (interleaved(qkv, at) for at in range(3))
    edges = (
        DeclaredEdge("norm", "input_layernorm", (qkv,), gathers=True, shift=True),
        DeclaredEdge("norm", "post_attention_layernorm", (up,), gathers=True, shift=True),
        DeclaredEdge("heads", v, (out,), "matrix", EVERY, shift=True),
        qk_edge(q, k, EVERY, rotary=0),
    )
    return LayerKind(((qkv,), (out,), (up,), (down,)), edges, attention=None)


def attention_edges(qk: DeclaredEdge) -> tuple[DeclaredEdge, ...]:
    """The edges of an attention before a mixture of experts."""
    heads = DeclaredEdge("heads", V, (O,), "matrix", HEADS, shift=True)
    return (DeclaredEdge("norm", NORMS[0], (Q, K, V), gathers=True, shift=True), heads, qk)


def qwen2_moe_layer(config: Any, index: int) -> LayerKind:
    """Experts, and a shared one that is called with tokens, as they are."""
    experts = gated_experts("mlp.experts", config.num_experts, config.moe_intermediate_size, config.hidden_size)
    gate, up, down = (f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))
    routers = ("mlp.gate", "mlp.shared_expert_gate")
    edges = (
        *attention_edges(qk_edge(Q, K, HEADS, HEADS.dim)),
        *expert_edges(experts, NORMS[1], (*routers, gate, up)),
        DeclaredEdge("channels", up, (down,), partner=gate),
    )
    groups = ((Q, K, V), (O,), (gate, up), (down,), *((name,) for name in routers), *experts.groups)
    return LayerKind(groups, edges, flat=frozenset((gate, up, down)), experts=experts, routers=frozenset(routers))


def gpt_oss_layer(config: Any, index: int) -> LayerKind:
    """A clamp keeps any scale from passing between up and down."""
    count, width = config.num_local_experts, config.intermediate_size
    both = ("gate_up_proj", "gate_up_proj_bias")
    gate = ExpertLinear("gate_proj", both[0], tuple(range(0, 2 * width, 2)), both[1])
    up = ExpertLinear("up_proj", both[0], tuple(range(1, 2 * width, 2)), both[1])
    down = ExpertLinear("down_proj", "down_proj", range(config.hidden_size), "down_proj_bias")
    experts = Experts("mlp.experts", count, (gate, up), down, transposed=True, apart=False)
    norm = expert_edges(experts, NORMS[1], ("mlp.router",))[0]
    edges = (*attention_edges(qk_edge(Q, K, HEADS, HEADS.dim)), norm)
    groups = ((Q, K, V), (O,), ("mlp.router",), *experts.groups)
    return LayerKind(groups, edges, experts=experts, routers=frozenset({"mlp.router"}))


CONFIGS: dict[str, Any] = {
    "gpt-neox": lambda: GPTNeoXConfig(
        **SMALL,
        **TOKENS,
        intermediate_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=True,  # else its files have another name for the head
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "gpt2": lambda: GPT2Config(**SMALL, **TOKENS, n_positions=128, n_inner=96),
    "lfm2": lambda: Lfm2Config(
        **COMMON, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False
    ),
    "nemotron": lambda: NemotronConfig(
        **COMMON,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "cohere": lambda: CohereConfig(**COMMON, logit_scale=0.25),
    "olmo2": lambda: Olmo2Config(**COMMON),
    "bloom": lambda: BloomConfig(**SMALL, **TOKENS),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **COMMON,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        mlp_only_layers=[],
        decoder_sparse_step=1,
    ),
    "gpt-oss": lambda: GptOssConfig(
        **{**COMMON, "intermediate_size": 32},
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}
MIXTURES = ("qwen2-moe", "gpt-oss")

FAMILIES: dict[str, Family] = {
    "gpt-neox": Family(
        "gpt-neox",
        ("GPTNeoXForCausalLM",),
        "gpt_neox.layers",
        gpt_neox_layer,
        head="lm_head",
        embed="gpt_neox.embed_in",
    ),
    "gpt2": Family("gpt2", ("GPT2LMHeadModel",), "transformer.h", gpt2_layer, embed="transformer.wte"),
    "lfm2": Family("lfm2", ("Lfm2ForCausalLM",), "model.layers", lfm2_layer),
    "nemotron": Family("nemotron", ("NemotronForCausalLM",), "model.layers", nemotron_layer),
    "cohere": Family("cohere", ("CohereForCausalLM",), "model.layers", cohere_layer),
    "olmo2": Family("olmo2", ("Olmo2ForCausalLM",), "model.layers", olmo2_layer),
    "qwen2-moe": Family("qwen2-moe", ("Qwen2MoeForCausalLM",), "model.layers", qwen2_moe_layer),
    "gpt-oss": Family("gpt-oss", ("GptOssForCausalLM",), "model.layers", gpt_oss_layer),
    "bloom": Family(
        "bloom", ("BloomForCausalLM",), "transformer.h", bloom_layer, embed="transformer.word_embeddings"
    ),
}
