"""Qwen2, Qwen3, and Qwen3-Next and Qwen3.5, most of whose layers have linear attention; their mixtures of experts.

https://github.com/ggml-org/llama.cpp/tree/master/src/models (qwen2, qwen2moe, qwen3, qwen3moe, qwen3next, qwen35,
qwen35moe)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.exporters.gguf_architectures.architecture import (
    Architecture,
    Facts,
    expected,
    experts,
    has_biases,
    plus_one,
    without_channels,
)
from lowbit.exporters.gguf_heads import head_dim


def _window(config: Any, name: str) -> str | None:
    window = config.sliding_window if getattr(config, "use_sliding_window", False) else None
    return f"sliding_window {window}; llama.cpp's {name} has none" if window is not None else None


def _qwen2_unlike(config: Any) -> str | None:
    return _window(config, "qwen2")


def _qwen3_unlike(config: Any) -> str | None:
    if config.attention_bias:
        return "attention_bias; llama.cpp's qwen3 has no attention biases"
    return _window(config, "qwen3")


def _all_sparse(config: Any, name: str) -> str | None:
    if config.mlp_only_layers:
        return f"mlp_only_layers {config.mlp_only_layers}; llama.cpp's {name} has experts in every layer"
    return expected(config, name, decoder_sparse_step=1)


def _qwen2_moe_facts(config: Any) -> Facts:
    return experts(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) | {
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size
    }


def _qwen2_moe_unlike(config: Any) -> str | None:
    return (
        _all_sparse(config, "qwen2moe")
        or expected(config, "qwen2moe", norm_topk_prob=False)
        or _window(config, "qwen2moe")
    )


def _qwen3_moe_facts(config: Any) -> Facts:
    return experts(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size)


def _qwen3_moe_unlike(config: Any) -> str | None:
    return (
        _all_sparse(config, "qwen3moe")
        or expected(config, "qwen3moe", norm_topk_prob=True)
        or has_biases(config, "qwen3moe", "attention_bias")
        or _window(config, "qwen3moe")
    )


def _first_row(matrix: Tensor) -> Tensor:
    """A linear of one output as a vector."""
    return matrix[0]


def _decay(logarithm: Tensor) -> Tensor:
    """What multiplies the step of linear attention, from the logarithm of its magnitude."""
    return -logarithm.exp()


def sections(pairs: int) -> list[int]:
    """How many of the rotated pairs follow each of three positions, which are equal in texts; the fourth has none.

    >>> sections(32), sections(2)
    ([11, 11, 10, 0], [1, 1, 0, 0])
    """
    return [(pairs + 2 - i) // 3 for i in range(3)] + [0]


def _qwen35_facts(config: Any) -> Facts:
    rope = config.rope_parameters
    pairs = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)) // 2
    given = rope.get("mrope_section")
    return {
        "rope.dimension_sections": [*given, 0] if given else sections(pairs),
        **_linear_facts(config),
    }


def _linear_facts(config: Any) -> Facts:
    """Keys of layers with linear attention."""
    return {
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
    }


def value_heads(config: Any, width: int) -> Tensor:
    """Value heads in the file's order, ``width`` entries each: of each key head the first, then the second, ...

    >>> from types import SimpleNamespace
    >>> value_heads(SimpleNamespace(linear_num_key_heads=2, linear_num_value_heads=4), 1).tolist()
    [0, 2, 1, 3]
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    return torch.arange(values * width).reshape(keys, values // keys, width).transpose(0, 1).flatten()


def _qwen35_rows(config: Any, name: str) -> Tensor | None:
    """Value heads in the file's order, behind queries and keys where these are in one matrix with them."""
    within, dim = name.rpartition("linear_attn.")[2], config.linear_value_head_dim
    if config.linear_num_value_heads == config.linear_num_key_heads:
        return None
    if within in ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"):
        return value_heads(config, 1)
    if within == "in_proj_z.weight":
        return value_heads(config, dim)
    if within in ("in_proj_qkv.weight", "conv1d.weight"):
        before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        return torch.cat([torch.arange(before), before + value_heads(config, dim)])
    return None


def _qwen35_columns(config: Any, name: str) -> Tensor | None:
    same = config.linear_num_value_heads == config.linear_num_key_heads
    if same or not name.endswith("linear_attn.out_proj.weight"):
        return None
    return value_heads(config, config.linear_value_head_dim)


def _qwen35_piece(config: Any) -> int:
    return int(config.linear_value_head_dim)


def _qwen35_unlike(config: Any) -> str | None:
    given = config.rope_parameters.get("mrope_section")
    pairs = int(head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    if given and (len(given) != 3 or sum(given) != pairs):
        return f"rope_parameters.mrope_section {given}; llama.cpp's qwen35 rotates {pairs} pairs in three sections"
    return _linear_unlike(config, "qwen35")


def _linear_unlike(config: Any, name: str) -> str | None:
    if config.linear_num_value_heads % config.linear_num_key_heads:
        return (
            f"linear_num_value_heads {config.linear_num_value_heads} are no multiple of linear_num_key_heads "
            f"{config.linear_num_key_heads}, which llama.cpp's {name} needs"
        )
    if config.linear_value_head_dim != config.linear_key_head_dim:
        return f"linear_value_head_dim {config.linear_value_head_dim}; llama.cpp's {name} takes linear_key_head_dim"
    return has_biases(config, name, "attention_bias") or expected(config, name, rms_norm_eps=1e-6)


def _qwen35_moe_facts(config: Any) -> Facts:
    return _qwen35_facts(config) | _qwen2_moe_facts(config)


def _qwen3_next_facts(config: Any) -> Facts:
    return _linear_facts(config) | _qwen2_moe_facts(config)


def _qwen3_next_unlike(config: Any) -> str | None:
    return (
        _all_sparse(config, "qwen3next")
        or expected(config, "qwen3next", norm_topk_prob=True)
        or _linear_unlike(config, "qwen3next")
    )


def _qwen3_next_rows(config: Any, name: str) -> Tensor | None:
    """Query, key, values, gates of key head 0, then of head 1, ... in the model; in the file those of all heads."""
    if not name.endswith("in_proj_qkvz.weight"):
        return None
    heads, each = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    key, value = config.linear_key_head_dim, each * config.linear_value_head_dim
    rows = torch.arange(heads * 2 * (key + value)).reshape(heads, -1)
    return torch.cat([part.flatten() for part in rows.split([key, key, value, value], dim=1)])


def _qwen3_next_split(config: Any, within: str) -> dict[str, int]:
    """Gates are in a matrix of their own."""
    if within != "linear_attn.in_proj_qkvz.weight":
        return {}
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return {"attn_qkv.weight": 2 * keys + values, "attn_gate.weight": values}


QWEN2 = Architecture("qwen2", square=True, unlike=_qwen2_unlike)
QWEN3 = Architecture("qwen3", tensor_scales=True, unlike=_qwen3_unlike)
QWEN2_MOE = Architecture(
    "qwen2moe",
    square=True,
    head="own",
    facts=_qwen2_moe_facts,
    unlike=_qwen2_moe_unlike,
    values={"shared_expert_gate.weight": _first_row},
)
QWEN3_MOE = Architecture("qwen3moe", tensor_scales=True, facts=_qwen3_moe_facts, unlike=_qwen3_moe_unlike)
QWEN35 = Architecture(
    "qwen35",
    ("default",),
    partial_rope=True,
    tensor_scales=True,
    facts=_qwen35_facts,
    unlike=_qwen35_unlike,
    names={"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"},
    values={
        "linear_attn.norm.weight": Tensor.contiguous,
        "norm.weight": plus_one,
        "linear_attn.A_log": _decay,
        "conv1d.weight": without_channels,
    },
    rows=_qwen35_rows,
    columns=_qwen35_columns,
    piece=_qwen35_piece,
)
QWEN35_MOE = replace(
    QWEN35,
    name="qwen35moe",
    facts=_qwen35_moe_facts,
    values={"shared_expert_gate.weight": _first_row, **QWEN35.values},
)
QWEN3_NEXT = Architecture(
    "qwen3next",
    partial_rope=True,
    facts=_qwen3_next_facts,
    unlike=_qwen3_next_unlike,
    names={**QWEN35.names, "linear_attn.in_proj_ba.weight": "ssm_ba.weight"},
    values=QWEN35_MOE.values,
    rows=_qwen3_next_rows,
    split=_qwen3_next_split,
)
