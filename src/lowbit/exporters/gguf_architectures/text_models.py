"""Text models within models that also see: the class of text models whose row each of them is written by.

A text has one position for each token, so what such a text model adds for images (positions in three directions,
features added behind early layers) computes nothing in it, and llama.cpp's graph of the class for text alone does.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import AutoModelForCausalLM

from lowbit.models.build import is_composite, text_config

# Classes whose text models were compared with llama.cpp.
CHECKED = (
    "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
)
# By the text model's type: the class that computes the same for texts, where the library has none of that type.
SAME_FOR_TEXTS = {
    "glm4v_text": "Glm4ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
}


def text_model(config: Any) -> Any:
    """The config of a model's text model, which names the class of text models that it is written as.

    Args:
        config: of any model. One without other parts, or of a class that is not ``CHECKED``, is returned itself.

    >>> from transformers import Qwen3VLConfig
    >>> text_model(Qwen3VLConfig(architectures=["Qwen3VLForConditionalGeneration"])).architectures
    ['Qwen3ForCausalLM']
    """
    if not is_composite(config) or config.architectures[0] not in CHECKED:
        return config
    text = deepcopy(text_config(config))
    known = AutoModelForCausalLM._model_mapping
    name = known[type(text)].__name__ if type(text) in known else SAME_FOR_TEXTS.get(text.model_type)
    text.architectures = [name or text.model_type]
    text.tie_word_embeddings = config.tie_word_embeddings
    return text
