"""The architectures that are written for llama.cpp: one value for each class of the library's models.

A new one is a value in a file here, a line in ``ARCHITECTURES``, and a tiny model in ``tests/gguf_models.py``: the
tests then load its file in llama.cpp and compare logits. What its loader and its graph need stands in llama.cpp's
``src/models/NAME.cpp``.
"""

from __future__ import annotations

from typing import Any

from lowbit.exporters.gguf_architectures.architecture import Architecture
from lowbit.exporters.gguf_architectures.exaone import EXAONE4
from lowbit.exporters.gguf_architectures.falcon import FALCON_H1
from lowbit.exporters.gguf_architectures.fused import GLM4, PHI3
from lowbit.exporters.gguf_architectures.gemma import GEMMA2, GEMMA3
from lowbit.exporters.gguf_architectures.gemma4 import GEMMA4
from lowbit.exporters.gguf_architectures.glm_moe import GLM4_MOE
from lowbit.exporters.gguf_architectures.gpt_oss import GPT_OSS
from lowbit.exporters.gguf_architectures.granite import GRANITE, GRANITE_HYBRID, GRANITE_MOE
from lowbit.exporters.gguf_architectures.hunyuan import HUNYUAN, HUNYUAN_MOE
from lowbit.exporters.gguf_architectures.lfm import LFM2
from lowbit.exporters.gguf_architectures.llama import ERNIE, LLAMA, MINISTRAL3, MIXTRAL, SEED_OSS, SMOLLM3
from lowbit.exporters.gguf_architectures.no_gate import ARCEE, NEMOTRON, STARCODER2
from lowbit.exporters.gguf_architectures.olmo import OLMO2, OLMO3, OLMOE
from lowbit.exporters.gguf_architectures.parallel import COHERE2, GPT_NEOX, STABLELM
from lowbit.exporters.gguf_architectures.qwen import (
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN35,
    QWEN35_MOE,
)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "MixtralForCausalLM": MIXTRAL,
    "Ministral3ForCausalLM": MINISTRAL3,
    "SmolLM3ForCausalLM": SMOLLM3,
    "GraniteForCausalLM": GRANITE,
    "GraniteMoeForCausalLM": GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": GRANITE_MOE,
    "GraniteMoeHybridForCausalLM": GRANITE_HYBRID,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Qwen3NextForCausalLM": QWEN3_NEXT,
    "Qwen3_5ForCausalLM": QWEN35,
    "Qwen3_5MoeForCausalLM": QWEN35_MOE,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma4ForCausalLM": GEMMA4,
    "Phi3ForCausalLM": PHI3,
    "Glm4ForCausalLM": GLM4,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO3,
    "OlmoeForCausalLM": OLMOE,
    "Cohere2ForCausalLM": COHERE2,
    "StableLmForCausalLM": STABLELM,
    "GPTNeoXForCausalLM": GPT_NEOX,
    "Lfm2ForCausalLM": LFM2,
    "GptOssForCausalLM": GPT_OSS,
    "SeedOssForCausalLM": SEED_OSS,
    "Ernie4_5ForCausalLM": ERNIE,
    "Exaone4ForCausalLM": EXAONE4,
    "FalconH1ForCausalLM": FALCON_H1,
    "HunYuanDenseV1ForCausalLM": HUNYUAN,
    "HunYuanMoEV1ForCausalLM": HUNYUAN_MOE,
    "ArceeForCausalLM": ARCEE,
    "NemotronForCausalLM": NEMOTRON,
    "Starcoder2ForCausalLM": STARCODER2,
}


def architecture_of(config: Any) -> Architecture | None:
    """The entry of a config's class, or ``None`` if it is not written for llama.cpp."""
    found = ARCHITECTURES.get((config.architectures or [""])[0])
    return found and (found.variant(config) or found)
