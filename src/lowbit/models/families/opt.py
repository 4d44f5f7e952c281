"""OPT: LayerNorm, biases, ReLU, learned positions, no rotary embedding.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/opt/modeling_opt.py
"""

from typing import Any

from lowbit.models.architecture import DeclaredEdge, Heads, LayerKind
from lowbit.models.families.family import Family, check_heads, qk_edge

LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)


def opt_layer(config: Any, index: int) -> LayerKind:
    """A layer of OPT; all are alike. A ReLU passes positive factors through."""
    count = config.num_attention_heads
    heads = Heads(count, count, config.hidden_size // count)
    check_heads(heads)
    edges = (
        DeclaredEdge("norm", "self_attn_layer_norm", LINEARS[0], gathers=True, shift=True),
        DeclaredEdge("norm", "final_layer_norm", LINEARS[2], gathers=True, shift=True),
        DeclaredEdge("heads", "self_attn.v_proj", ("self_attn.out_proj",), "matrix", heads, shift=True),
        DeclaredEdge("channels", "fc1", ("fc2",), "positive", gathers=True),
        qk_edge("self_attn.q_proj", "self_attn.k_proj", heads, rotary=0),
    )
    return LayerKind(LINEARS, edges, flat=frozenset({"fc1", "fc2"}))


def _refuse(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        # The norm output also feeds the residual stream, so no transform can be folded into the norm (OPT-350M).
        return "OPT with layer norms after the residual sum (do_layer_norm_before: false) is not supported"
    if config.activation_function != "relu":
        return f"OPT with activation '{config.activation_function}': only relu commutes with a positive scale"
    if not config.layer_norm_elementwise_affine:
        return "OPT without layer norm gains is not supported: no parameter can absorb a scale"
    return None


OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    blocks="model.decoder.layers",
    kind=opt_layer,
    embed="model.decoder.embed_tokens",
    refuse=_refuse,
)
