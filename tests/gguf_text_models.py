"""Tiny random models that also see, whose text models are exported as ``.gguf``, as folders that llama.cpp loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    Gemma4Config,
    InternVLConfig,
    Mistral3Config,
    Qwen3_5MoeConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
)

import gguf_models
import wrapped
from gguf_models import SIZES, VOCAB
from tiny import tiny_tokenizer

SEE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 4}
TOWER = SEE | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
QWEN = SEE | {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64}
QWEN |= {"num_position_embeddings": 16, "deepstack_visual_indexes": []}
TOKENS = {"image_token_id": 127, "video_token_id": 126, "vision_start_token_id": 125, "vision_end_token_id": 124}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True}


def _text(case: str) -> dict[str, Any]:
    """The fields of a text model that is one of the cases of ``gguf_models``."""
    return SIZES | gguf_models.MODELS[case][1]


def _gemma3() -> Any:
    config = wrapped.CONFIGS["gemma3"]()
    config.text_config.layer_types = ["sliding_attention"] * 3
    return config


def _qwen3_5() -> Any:
    config = wrapped.CONFIGS["qwen3.5"]()
    config.text_config.vocab_size = VOCAB  # its tokenizer class adds a token of its own
    return config


def _gemma4() -> Any:
    see = SEE | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    see |= {"position_embedding_size": 64}
    return Gemma4Config(text_config=_text("gemma4"), vision_config=see, audio_config=None, image_token_id=127)


def _qwen3_5_moe() -> Any:
    rope = ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    return Qwen3_5MoeConfig(
        text_config=_text("qwen3.5-moe") | {"rope_parameters": rope}, vision_config=QWEN, **TOKENS
    )


def _qwen3_vl_moe() -> Any:
    text = _text("qwen3-moe") | {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}}
    return Qwen3VLMoeConfig(text_config=text, vision_config=QWEN, **TOKENS)


def _mistral3() -> Any:
    see = TOWER | {"model_type": "pixtral", "head_dim": 16}
    text = _text("ministral3") | {"model_type": "ministral3"}
    return Mistral3Config(text_config=text, vision_config=see, image_token_index=127, spatial_merge_size=2)


def _smolvlm() -> Any:
    text = SIZES | {"model_type": "llama"}
    return SmolVLMConfig(text_config=text, vision_config=TOWER, image_token_id=127, scale_factor=2)


def _internvl() -> Any:
    see = TOWER | {"image_size": [16, 16], "patch_size": [4, 4]}
    return InternVLConfig(text_config=SIZES | {"model_type": "qwen2"}, vision_config=see, image_token_id=127)


# Name of a case: llama.cpp's name of the text model's architecture, and the config.
CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "gemma3": ("gemma3", _gemma3),
    "gemma4": ("gemma4", _gemma4),
    "glm4v": ("glm4", wrapped.CONFIGS["glm4v"]),
    "internvl": ("qwen2", _internvl),
    "lfm2-vl": ("lfm2", wrapped.CONFIGS["lfm2-vl"]),
    "llava": ("llama", wrapped.CONFIGS["llava"]),
    "mistral3": ("mistral3", _mistral3),
    "qwen2.5-vl": ("qwen2", wrapped.CONFIGS["qwen2.5-vl"]),
    "qwen3-vl": ("qwen3", wrapped.CONFIGS["qwen3-vl"]),
    "qwen3-vl-moe": ("qwen3moe", _qwen3_vl_moe),
    "qwen3.5": ("qwen35", _qwen3_5),
    "qwen3.5-moe": ("qwen35moe", _qwen3_5_moe),
    "smolvlm": ("llama", _smolvlm),
}


def saved(folder: Path, case: str) -> Path:
    """A checkpoint folder of a random model of a case, with a tokenizer that llama.cpp loads and a text."""
    wrapped.save_wrapped(folder, case, CONFIGS[case][1]())
    tiny_tokenizer(merge=True).save_pretrained(folder)
    return folder
