"""LFM2: layers with a gated short convolution beside layers with attention.

https://github.com/ggml-org/llama.cpp/blob/master/src/models/lfm2.cpp
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import Architecture, Facts, has_biases, without_channels


def width(config: Any) -> int:
    """Width of the MLP: the config's, or two thirds of it in whole multiples, as the library derives it.

    >>> from types import SimpleNamespace
    >>> fields = {"intermediate_size": 96, "block_ffn_dim_multiplier": 1.5, "block_multiple_of": 64}
    >>> width(SimpleNamespace(block_auto_adjust_ff_dim=True, **fields))
    128
    """
    size = int(config.intermediate_size)
    if not config.block_auto_adjust_ff_dim:
        return size
    size = int(2 * size / 3)
    if config.block_ffn_dim_multiplier is not None:
        size = int(config.block_ffn_dim_multiplier * size)
    step = int(config.block_multiple_of)
    return step * ((size + step - 1) // step)


def _facts(config: Any) -> Facts:
    return {
        "feed_forward_length": width(config),
        "attention.head_count_kv": [
            config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types
        ],
        "shortconv.l_cache": config.conv_L_cache,
    }


def _unlike(config: Any) -> str | None:
    return has_biases(config, "lfm2", "conv_bias")


LFM2 = Architecture(
    "lfm2",
    epsilon=("norm_eps", "attention.layer_norm_rms_epsilon"),
    square=True,
    facts=_facts,
    unlike=_unlike,
    values={"conv.conv.weight": without_channels},
)
