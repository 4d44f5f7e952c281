"""An MLP without a gate: Arcee and Nemotron with a squared ReLU, StarCoder2 with a GELU.

https://github.com/ggml-org/llama.cpp/tree/master/src/models (arcee, nemotron, starcoder2)
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import Architecture, expected, has_biases, plus_one


def _arcee_unlike(config: Any) -> str | None:
    return has_biases(config, "arcee", "attention_bias", "mlp_bias")


def _starcoder2_unlike(config: Any) -> str | None:
    return expected(config, "starcoder2", use_bias=True, sliding_window=None)


ARCEE = Architecture(
    "arcee", ("default", "linear", "yarn", "llama3"), activation="relu2", adjacent=True, unlike=_arcee_unlike
)
NEMOTRON = Architecture(
    "nemotron",
    partial_rope=True,
    activation="relu2",
    epsilon=("norm_eps", "attention.layer_norm_epsilon"),
    square=True,
    head="own",
    values={"norm.weight": plus_one},
)
STARCODER2 = Architecture(
    "starcoder2",
    activation="gelu_pytorch_tanh",
    epsilon=("norm_epsilon", "attention.layer_norm_epsilon"),
    square=True,
    unlike=_starcoder2_unlike,
)
