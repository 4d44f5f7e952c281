"""Llama, and the architectures with the same layers: Mistral, SmolLM (whose config names Llama).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/modeling_llama.py
"""

from lowbit.models.architecture import DeclaredEdge, Family, rotary_heads

LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
HEADS_AND_CHANNELS = (
    DeclaredEdge("heads", "self_attn.v_proj", ("self_attn.o_proj",)),
    DeclaredEdge("channels", "mlp.up_proj", ("mlp.down_proj",)),
)
NORMS = (
    DeclaredEdge("norm", "input_layernorm", LINEARS[0]),
    DeclaredEdge("norm", "post_attention_layernorm", LINEARS[2]),
)
QK = DeclaredEdge("qk", "self_attn.q_proj", ("self_attn.k_proj",))

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    blocks="model.layers",
    linears=LINEARS,
    edges=(*NORMS, *HEADS_AND_CHANNELS, QK),
    heads=rotary_heads,
)
