"""Phi-3: one fused linear for q, k and v, one for gate and up.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/phi3/modeling_phi3.py
"""

from dataclasses import replace
from typing import Any

from lowbit.models.architecture import DeclaredEdge, LayerKind, Part
from lowbit.models.families.family import heads_of, qk_edge, rotary_dims
from lowbit.models.families.llama import DOWN, LLAMA, NORMS, O

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"


def phi3_layer(config: Any, index: int) -> LayerKind:
    """A layer of Phi-3; all are alike."""
    heads = heads_of(config)
    q, kv, width = heads.query * heads.dim, heads.kv * heads.dim, config.intermediate_size
    rows = {"q": range(q), "k": range(q, q + kv), "v": range(q + kv, q + 2 * kv)}
    parts = {name: Part(QKV, own, name=name) for name, own in rows.items()}
    gate, up = Part(GATE_UP, range(width), name="gate"), Part(GATE_UP, range(width, 2 * width), name="up")
    edges = (
        DeclaredEdge("norm", NORMS[0], (QKV,), gathers=True, shift=True),
        DeclaredEdge("norm", NORMS[1], (GATE_UP,), gathers=True, shift=True),
        DeclaredEdge("heads", parts["v"], (O,), "matrix", heads, shift=True),
        DeclaredEdge("channels", up, (DOWN,), partner=gate, gathers=True),
        qk_edge(parts["q"], parts["k"], heads, rotary_dims(config, heads.dim, partial=True)),
    )
    return LayerKind(((QKV,), (O,), (GATE_UP,), (DOWN,)), edges)


PHI3 = replace(LLAMA, name="phi3", architectures=("Phi3ForCausalLM",), kind=phi3_layer, text_models=("Phi3Model",))
