"""Qwen2 (biases on q, k and v) and Qwen3 (norms on q and k, independent head width), with their vision models' texts.

Rotary embeddings of three positions (time, height, width) rotate the same pairs as those of one.

A norm over a head cancels any scale of q_proj or k_proj, so the edge between q and k scales the norms' gains.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2/modeling_qwen2.py
https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3/modeling_qwen3.py
"""

from dataclasses import replace
from typing import Any

from lowbit.models.architecture import DeclaredEdge, Heads, LayerKind
from lowbit.models.families.family import heads_of, qk_edge, rotary_dims
from lowbit.models.families.llama import LINEARS, LLAMA, heads_and_channels, norm_edges


def qk_norms(config: Any, heads: Heads, offset: float = 0.0) -> DeclaredEdge:
    """The edge between the norms of q and k."""
    ends = "self_attn.q_norm", "self_attn.k_norm"
    return qk_edge(*ends, heads, rotary_dims(config, heads.dim), gains=True, offset=offset)


def qwen3_layer(config: Any, index: int) -> LayerKind:
    """A layer of Qwen3; all are alike."""
    heads = heads_of(config)
    return LayerKind(LINEARS, (*norm_edges(), *heads_and_channels(heads), qk_norms(config, heads)))


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    text_models=("Qwen2Model", "Qwen2_5_VLTextModel"),
)
QWEN3 = replace(
    LLAMA,
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    kind=qwen3_layer,
    text_models=("Qwen3Model", "Qwen3VLTextModel"),
)
