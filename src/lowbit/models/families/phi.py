"""Phi-3: one fused linear for q, k and v, one for gate and up.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/phi3/modeling_phi3.py
"""

from dataclasses import replace

from lowbit.models.architecture import DeclaredEdge, Part
from lowbit.models.families.llama import LLAMA

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"

PHI3 = replace(
    LLAMA,
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    linears=((QKV,), ("self_attn.o_proj",), (GATE_UP,), ("mlp.down_proj",)),
    edges=(
        DeclaredEdge("norm", "input_layernorm", (QKV,)),
        DeclaredEdge("norm", "post_attention_layernorm", (GATE_UP,)),
        DeclaredEdge("heads", Part(QKV, "v"), ("self_attn.o_proj",)),
        DeclaredEdge("channels", Part(GATE_UP, "up"), ("mlp.down_proj",)),
        DeclaredEdge("qk", Part(QKV, "q"), (Part(QKV, "k"),)),
    ),
)
