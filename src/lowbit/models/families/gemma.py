"""Gemma2 and Gemma3 text models: norms before and after each half of a layer, gains stored as ``1 + weight``.

The norms after attention and MLP read a linear's output and write to the residual stream, so no edge crosses them.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma2/modeling_gemma2.py
https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma3/modeling_gemma3.py
"""

from dataclasses import replace

from lowbit.models.architecture import DeclaredEdge
from lowbit.models.families.llama import HEADS_AND_CHANNELS, LINEARS, LLAMA, QK
from lowbit.models.families.qwen import QK_NORMS

NORMS = (
    DeclaredEdge("norm", "input_layernorm", LINEARS[0]),
    DeclaredEdge("norm", "pre_feedforward_layernorm", LINEARS[2]),
)

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    edges=(*NORMS, *HEADS_AND_CHANNELS, QK),
    norm_offset=1.0,
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    edges=(*NORMS, *HEADS_AND_CHANNELS, QK_NORMS),
    qk_norm_per_head=True,
)
