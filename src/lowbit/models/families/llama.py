"""Llama, and the architectures with the same layers: Mistral, SmolLM (whose config names Llama).

https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/modeling_llama.py
"""

from typing import Any

from lowbit.models.architecture import DeclaredEdge, Heads, LayerKind
from lowbit.models.families.family import Family, heads_of, qk_edge, rotary_dims

Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
LINEARS = ((Q, K, V), (O,), (GATE, UP), (DOWN,))
NORMS = ("input_layernorm", "post_attention_layernorm")


def norm_edges(norms: tuple[str, str] = NORMS, offset: float = 0.0) -> tuple[DeclaredEdge, ...]:
    """The edges from the norms before attention and MLP to their readers."""
    return tuple(
        DeclaredEdge("norm", norm, LINEARS[at], offset=offset, gathers=True, shift=True)
        for norm, at in zip(norms, (0, 2), strict=True)
    )


def heads_and_channels(heads: Heads) -> tuple[DeclaredEdge, ...]:
    """The edges from v to o and from up to down."""
    return (
        DeclaredEdge("heads", V, (O,), "matrix", heads, shift=True),
        DeclaredEdge("channels", UP, (DOWN,), partner=GATE, gathers=True),
    )


def llama_layer(config: Any, index: int) -> LayerKind:
    """A layer of Llama; all are alike."""
    heads = heads_of(config)
    qk = qk_edge(Q, K, heads, rotary_dims(config, heads.dim))
    return LayerKind(LINEARS, (*norm_edges(), *heads_and_channels(heads), qk))


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    blocks="model.layers",
    kind=llama_layer,
    text_models=("LlamaModel", "MistralModel"),
)
