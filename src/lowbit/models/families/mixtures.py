"""Mixtures of experts: Mixtral, and Qwen3-MoE, some of whose layers may be dense.

Every expert and the router read the norm behind the attention, so one edge ends in all of them. An expert's product
of gate and up goes to its own down alone.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/mixtral/modeling_mixtral.py
https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_moe/modeling_qwen3_moe.py
"""

from dataclasses import replace
from typing import Any

from lowbit.models.architecture import DeclaredEdge, Experts, LayerKind, Ref
from lowbit.models.experts import gated_experts
from lowbit.models.families.family import heads_of, qk_edge, rotary_dims
from lowbit.models.families.llama import LLAMA, NORMS, K, O, Q, V
from lowbit.models.families.qwen import qk_norms, qwen3_layer

ROUTER = "mlp.gate"


def expert_edges(experts: Experts, norm: str, readers: tuple[Ref, ...]) -> tuple[DeclaredEdge, ...]:
    """The edges of gated experts whose product is elementwise: from a norm, and from each expert's up to its down.

    Args:
        experts: the mixture.
        norm: the norm that the experts read.
        readers: what reads it beside them, the router among it.
    """
    gate, up = experts.reads
    inner = tuple(experts.name(number, linear) for number in range(experts.count) for linear in (gate, up))
    products = (
        DeclaredEdge(
            "channels",
            experts.name(number, up),
            (experts.name(number, experts.writes),),
            partner=experts.name(number, gate),
        )
        for number in range(experts.count)
    )
    return (DeclaredEdge("norm", norm, (*readers, *inner)), *products)


def _mixture(experts: Experts, qk: DeclaredEdge, heads: Any) -> LayerKind:
    norm, *products = expert_edges(experts, NORMS[1], (ROUTER,))
    edges = (
        DeclaredEdge("norm", NORMS[0], (Q, K, V), gathers=True, shift=True),
        norm,
        DeclaredEdge("heads", V, (O,), "matrix", heads, shift=True),
        *products,
        qk,
    )
    groups = ((Q, K, V), (O,), (ROUTER,), *experts.groups)
    return LayerKind(groups, edges, experts=experts, routers=frozenset({ROUTER}))


def mixtral_layer(config: Any, index: int) -> LayerKind:
    """A layer of Mixtral; all are alike."""
    heads = heads_of(config)
    experts = gated_experts(
        "mlp.experts", config.num_local_experts, config.intermediate_size, config.hidden_size, ("w1", "w3", "w2")
    )
    return _mixture(experts, qk_edge(Q, K, heads, rotary_dims(config, heads.dim)), heads)


def qwen3_moe_layer(config: Any, index: int) -> LayerKind:
    """A layer with experts, or a dense one: ``mlp_only_layers`` and ``decoder_sparse_step`` of the config decide."""
    if index in config.mlp_only_layers or not config.num_experts or (index + 1) % config.decoder_sparse_step:
        return qwen3_layer(config, index)
    heads = heads_of(config)
    experts = gated_experts("mlp.experts", config.num_experts, config.moe_intermediate_size, config.hidden_size)
    return _mixture(experts, qk_norms(config, heads), heads)


MIXTRAL = replace(LLAMA, name="mixtral", architectures=("MixtralForCausalLM",), kind=mixtral_layer, text_models=())
QWEN3_MOE = replace(
    LLAMA, name="qwen3-moe", architectures=("Qwen3MoeForCausalLM",), kind=qwen3_moe_layer, text_models=()
)
