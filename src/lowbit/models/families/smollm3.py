"""SmolLM3: Llama's layers, every fourth without a rotary embedding.

Without rotation any matrix per head folds between q and k.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/smollm3/modeling_smollm3.py
"""

from dataclasses import replace
from typing import Any

from lowbit.models.architecture import LayerKind
from lowbit.models.families.family import heads_of, qk_edge, rotary_dims
from lowbit.models.families.llama import LINEARS, LLAMA, K, Q, heads_and_channels, norm_edges


def smollm3_layer(config: Any, index: int) -> LayerKind:
    """A layer with or without a rotary embedding, as ``no_rope_layers`` says (1: with)."""
    heads = heads_of(config)
    rotary = rotary_dims(config, heads.dim) if config.no_rope_layers[index] else 0
    return LayerKind(LINEARS, (*norm_edges(), *heads_and_channels(heads), qk_edge(Q, K, heads, rotary)))


SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    kind=smollm3_layer,
    text_models=("SmolLM3Model",),
)
