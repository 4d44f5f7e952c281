"""Qwen2 (biases on q, k and v) and Qwen3 (norms on q and k, independent head width).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2/modeling_qwen2.py
https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3/modeling_qwen3.py
"""

from dataclasses import replace

from lowbit.models.architecture import DeclaredEdge
from lowbit.models.families.llama import HEADS_AND_CHANNELS, LLAMA, NORMS

# A norm over a head cancels any scale of q_proj or k_proj, so the edge scales the gains of the two norms.
QK_NORMS = DeclaredEdge("qk", "self_attn.q_norm", ("self_attn.k_norm",))

QWEN2 = replace(LLAMA, name="qwen2", architectures=("Qwen2ForCausalLM",))
QWEN3 = replace(
    LLAMA,
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    edges=(*NORMS, *HEADS_AND_CHANNELS, QK_NORMS),
    qk_norm_per_head=True,
)
