"""Gemma2 and Gemma3 text models: norms before and after each half of a layer, gains stored as ``1 + weight``.

The norms after attention and MLP read a linear's output and write to the residual stream, so no edge crosses them.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma2/modeling_gemma2.py
https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma3/modeling_gemma3.py
"""

from dataclasses import replace
from typing import Any

from lowbit.models.architecture import LayerKind
from lowbit.models.families.family import heads_of, qk_edge, rotary_dims
from lowbit.models.families.llama import LINEARS, LLAMA, K, Q, heads_and_channels, norm_edges
from lowbit.models.families.qwen import qk_norms

NORMS = norm_edges(("input_layernorm", "pre_feedforward_layernorm"), offset=1.0)


def gemma2_layer(config: Any, index: int) -> LayerKind:
    """A layer of Gemma2; windows of the attention do not matter to the edges."""
    heads = heads_of(config)
    qk = qk_edge(Q, K, heads, rotary_dims(config, heads.dim))
    return LayerKind(LINEARS, (*NORMS, *heads_and_channels(heads), qk))


def gemma3_layer(config: Any, index: int) -> LayerKind:
    """A layer of Gemma3, with norms on q and k."""
    heads = heads_of(config)
    return LayerKind(LINEARS, (*NORMS, *heads_and_channels(heads), qk_norms(config, heads, offset=1.0)))


GEMMA2 = replace(
    LLAMA, name="gemma2", architectures=("Gemma2ForCausalLM",), kind=gemma2_layer, text_models=("Gemma2Model",)
)
GEMMA3 = replace(
    LLAMA, name="gemma3", architectures=("Gemma3ForCausalLM",), kind=gemma3_layer, text_models=("Gemma3TextModel",)
)
