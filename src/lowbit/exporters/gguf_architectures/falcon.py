"""Falcon-H1: attention and Mamba 2 beside each other in every layer.

Its factors (``key_multiplier`` and the like) have no place in llama.cpp's graph. Files hold matrices multiplied by
them, which quantized ones cannot be: a scale of 16 bits times a factor is another number. Models with factors are
refused.
https://github.com/ggml-org/llama.cpp/blob/master/src/models/falcon-h1.cpp
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import (
    Architecture,
    Facts,
    expected,
    has_biases,
    without_channels,
)
from lowbit.exporters.gguf_architectures.granite import as_column, as_row, decay_column

FACTORS = (
    "embedding_multiplier",
    "lm_head_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "key_multiplier",
    "mlp_multipliers",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
    "ssm_multipliers",
)
_BIASES = ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias")


def _facts(config: Any) -> Facts:
    return {
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state,
        "ssm.group_count": config.mamba_n_groups,
        "ssm.inner_size": config.mamba_d_ssm or int(config.mamba_expand * config.hidden_size),
        "ssm.time_step_rank": config.mamba_n_heads,
    }


def _unlike(config: Any) -> str | None:
    for field in FACTORS:
        value = getattr(config, field)
        if any(factor != 1.0 for factor in (value if isinstance(value, list | tuple) else [value])):
            return (
                f"{field} {value}; llama.cpp's falcon-h1 has no factors, and a quantized weight times one is another"
            )
    if tuple(config.time_step_limit) != (0.0, float("inf")):
        return f"time_step_limit {config.time_step_limit}; llama.cpp's falcon-h1 has none"
    if config.mamba_rms_norm and (why := _norm_unlike(config)) is not None:
        return why
    return expected(config, "falcon-h1", mamba_conv_bias=True) or has_biases(config, "falcon-h1", *_BIASES)


def _norm_unlike(config: Any) -> str | None:
    return expected(config, "falcon-h1", mamba_norm_before_gate=False, mamba_n_groups=1)


FALCON_H1 = Architecture(
    "falcon-h1",
    facts=_facts,
    unlike=_unlike,
    names={
        "mamba.A_log": "ssm_a",
        "mamba.D": "ssm_d",
        "mamba.dt_bias": "ssm_dt.bias",
        "pre_ff_layernorm.weight": "ffn_norm",
    },
    values={
        "mamba.A_log": decay_column,
        "mamba.D": as_column,
        "mamba.norm.weight": as_row,
        "conv1d.weight": without_channels,
    },
)
