"""EXAONE 4: norms behind each half; in the largest model windows, and no rotary embedding in layers without.

https://github.com/ggml-org/llama.cpp/blob/master/src/models/exaone4.cpp
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import Architecture, Facts, has_biases, windowed

WINDOWED = 64  # layers of the model that llama.cpp gives windows; any other has none


def _facts(config: Any) -> Facts:
    if not config.sliding_window:
        return {}
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": windowed(config),
    }


def _unlike(config: Any) -> str | None:
    has = bool(config.sliding_window)
    if has != (config.num_hidden_layers == WINDOWED):
        return (
            f"sliding_window {config.sliding_window} with num_hidden_layers {config.num_hidden_layers}; llama.cpp's "
            f"exaone4 has windows with {WINDOWED} layers and none with others"
        )
    return has_biases(config, "exaone4", "attention_bias")


EXAONE4 = Architecture("exaone4", ("default", "linear", "yarn", "llama3"), square=True, facts=_facts, unlike=_unlike)
