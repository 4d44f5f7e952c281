"""Phi-3, Phi-3.5 and Phi-4, and GLM-4: gate and up in one matrix, gate first, which llama.cpp's graph takes apart.

https://github.com/ggml-org/llama.cpp/tree/master/src/models (phi3, glm4)
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import Architecture, Facts, has_window


def _phi3_facts(config: Any) -> Facts:
    """The window has no effect in llama.cpp; converters write it always."""
    return {"attention.sliding_window": config.sliding_window or 0}


def _phi3_unlike(config: Any) -> str | None:
    return has_window(config, "phi3")


PHI3 = Architecture(
    "phi3", ("default", "longrope"), partial_rope=True, square=True, facts=_phi3_facts, unlike=_phi3_unlike
)
GLM4 = Architecture("glm4", ("default", "linear", "yarn"), partial_rope=True)
