"""Granite, its mixtures of experts, and Granite 4: layers with attention, or some with Mamba 2, and no experts.

Granite 4 has gate and up of the MLP in one matrix, and no rotary embedding beside layers with Mamba.
https://github.com/ggml-org/llama.cpp/tree/master/src/models (granite, granite-moe, granite-hybrid)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lowbit.exporters.gguf_architectures.architecture import (
    ANY_ROPE,
    PLAIN,
    Architecture,
    Facts,
    expected,
    experts,
    has_biases,
    without_channels,
)


def _granite_facts(config: Any) -> Facts:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _granite_unlike(config: Any) -> str | None:
    fields = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
    zero = next((field for field in fields if not getattr(config, field)), None)
    return f"{zero} 0; llama.cpp's granite takes 0 for a factor that is not there" if zero else None


def _moe_facts(config: Any) -> Facts:
    """A shared expert beside those that are chosen is in some models."""
    shared = getattr(config, "shared_intermediate_size", 0)
    mixture = experts(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size)
    return _granite_facts(config) | mixture | {"expert_shared_feed_forward_length": shared or None}


def _dense_facts(config: Any) -> Facts:
    rotates = config.position_embedding_type == "rope"
    return _granite_facts(config) | {
        "feed_forward_length": config.shared_intermediate_size,
        "rope.scaling.finetuned": rotates,  # llama.cpp's switch of the rotary embedding
    }


def _hybrid_facts(config: Any) -> Facts:
    attention = [kind == "full_attention" for kind in config.layer_types]
    return _dense_facts(config) | {
        "attention.head_count_kv": [config.num_key_value_heads if own else 0 for own in attention],
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state,
        "ssm.group_count": config.mamba_n_groups,
        "ssm.inner_size": config.mamba_n_heads * config.mamba_d_head,
        "ssm.time_step_rank": config.mamba_n_heads,
    }


def _dense_unlike(config: Any) -> str | None:
    return expected(config, "granite", num_local_experts=0) or _granite_unlike(config)


def _hybrid_unlike(config: Any) -> str | None:
    if config.mamba_n_heads * config.mamba_d_head != 2 * config.hidden_size:
        return (
            f"mamba_n_heads {config.mamba_n_heads} of mamba_d_head {config.mamba_d_head}; llama.cpp's granitehybrid "
            "takes them to be twice as wide as hidden_size"
        )
    if tuple(config.time_step_limit) != (0.0, float("inf")):
        return f"time_step_limit {config.time_step_limit}; llama.cpp's granitehybrid has none"
    return (
        expected(config, "granitehybrid", mamba_n_groups=1, mamba_conv_bias=True)
        or has_biases(config, "granitehybrid", "mamba_proj_bias")
        or _dense_unlike(config)
    )


def decay_column(logarithm: Tensor) -> Tensor:
    """What multiplies the step of each head, from the logarithm of its magnitude, as a column."""
    return -logarithm.exp()[:, None]


def as_column(vector: Tensor) -> Tensor:
    """A number for each head as a column."""
    return vector[:, None]


def as_row(vector: Tensor) -> Tensor:
    """The gain of a norm over one group."""
    return vector[None]


def _attention_only(config: Any) -> Architecture | None:
    return GRANITE_DENSE if set(config.layer_types) == {"full_attention"} else None


def _gate_and_up(config: Any, within: str) -> dict[str, int]:
    """The halves of the matrix that has both, gate first."""
    return _halves(config, within, "ffn_gate.weight", "ffn_up.weight")


def _shared_gate_and_up(config: Any, within: str) -> dict[str, int]:
    return _halves(config, within, "ffn_gate_shexp.weight", "ffn_up_shexp.weight")


def _halves(config: Any, within: str, *names: str) -> dict[str, int]:
    found = within == "shared_mlp.input_linear.weight"
    return dict.fromkeys(names, int(config.shared_intermediate_size)) if found else {}


_OUTPUT = {"shared_mlp.output_linear.weight": "ffn_down.weight"}
GRANITE = Architecture("granite", ANY_ROPE, adjacent=True, facts=_granite_facts, unlike=_granite_unlike)
GRANITE_MOE = replace(
    GRANITE,
    name="granitemoe",
    facts=_moe_facts,
    names={
        "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
        "shared_mlp.output_linear.weight": "ffn_down_shexp.weight",
    },
    split=_shared_gate_and_up,
)
GRANITE_DENSE = replace(
    GRANITE,
    facts=_dense_facts,
    unlike=_dense_unlike,
    names=_OUTPUT,
    split=_gate_and_up,
)
GRANITE_HYBRID = replace(
    GRANITE_DENSE,
    name="granitehybrid",
    ropes=PLAIN,
    facts=_hybrid_facts,
    unlike=_hybrid_unlike,
    names=_OUTPUT | {"mamba.A_log": "ssm_a", "mamba.D": "ssm_d", "mamba.dt_bias": "ssm_dt.bias"},
    values={
        "mamba.A_log": decay_column,
        "mamba.D": as_column,
        "mamba.norm.weight": as_row,
        "conv1d.weight": without_channels,
    },
    variant=_attention_only,
)
