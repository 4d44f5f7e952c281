"""Tiny random models with other parts than a text model, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Glm4vConfig,
    Lfm2VlConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)

from tiny import COMMON, VOCAB, tiny_ids, tiny_tokenizer

IMAGE = VOCAB - 1  # the token that stands for a part of an image
_SEE = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 4}
_QWEN = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64}
_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VOCAB - 2,
    "vision_start_token_id": VOCAB - 3,
    "vision_end_token_id": VOCAB - 4,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}


def _gemma3() -> Any:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**COMMON, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": types}
    see = {**_SEE, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
    return Gemma3Config(
        text_config=text,
        vision_config=see,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VOCAB - 3,
        eoi_token_index=VOCAB - 4,
    )


def _qwen3() -> Any:
    text = {**COMMON, "head_dim": 16, "rope_parameters": {**_ROPE, "mrope_interleaved": True}}
    see = {**_SEE, **_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=text, vision_config=see, **_TOKENS)


def _qwen2() -> Any:
    see = {**_SEE, **_QWEN, "window_size": 16, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config={**COMMON, "rope_parameters": _ROPE}, vision_config=see, **_TOKENS)


def _llava() -> Any:
    see = {**_SEE, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "projection_dim": 32}
    text = {**COMMON, "model_type": "llama"}
    return LlavaConfig(
        text_config=text, vision_config={**see, "model_type": "clip_vision_model"}, image_token_id=IMAGE
    )


def _qwen3_5() -> Any:
    see = {**_SEE, **_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": []}
    rope = {**_ROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    types = ["linear_attention", "full_attention", "linear_attention"]
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    widths = {"head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text = {**COMMON, **sizes, **widths, "layer_types": types, "rope_parameters": rope}
    return Qwen3_5Config(text_config=text, vision_config=see, **_TOKENS)


def _lfm2() -> Any:
    see = {**_SEE, "num_hidden_layers": 2, "num_attention_heads": 2, "num_patches": 16}
    text = {**COMMON, "model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]}
    return Lfm2VlConfig(
        text_config=text, vision_config={**see, "model_type": "siglip2_vision_model"}, image_token_id=IMAGE
    )


def _glm4v() -> Any:
    see = {**_SEE, **_QWEN, "num_hidden_layers": 2, "image_size": 16}
    rope = {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    return Glm4vConfig(text_config={**COMMON, "rope_parameters": rope}, vision_config=see, **_TOKENS)


# Text models that no family declares; the last one has no class of its own for text alone.
DISCOVERED = {"qwen3.5": _qwen3_5, "lfm2-vl": _lfm2, "glm4v": _glm4v}
NAMES = ["gemma3", "qwen3-vl", "qwen2.5-vl"]
CONFIGS = DISCOVERED | dict(zip([*NAMES, "llava"], (_gemma3, _qwen3, _qwen2, _llava), strict=True))
# What the names of the text model's tensors begin with in files, and the list of its layers in the model.
TEXT = {"gemma3": "language_model.model.", "qwen3-vl": "model.language_model.", "qwen2.5-vl": "model."}
BLOCKS = "model.language_model.layers"


def save_wrapped(folder: Path, name: str, config: Any = None, **changes: Any) -> Any:
    """A tiny model of the family ``name``, or of a config, with tokenizer, preprocessor config and text."""
    config = config or CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key and key.endswith("weight"):
                parameter.add_(0.3 * noise)
            elif key.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise * (0.7 if "embed_tokens" in key else 1.2 / parameter.shape[1] ** 0.5))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 4, "do_resize": False}))
    ids = tiny_ids(1, 3000, seed=5)[0].tolist()
    (folder / "calib.txt").write_text("".join(chr(30 + i) for i in ids))
    return model.eval()


def image_inputs(name: str) -> dict[str, torch.Tensor]:
    """A text with an image of 16 by 16 pixels, which four tokens stand for, as a processor would give it."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([[5, 9, VOCAB - 3, IMAGE, IMAGE, IMAGE, IMAGE, VOCAB - 4, 20, 33, 41, 7]])
    inputs = {"input_ids": ids}
    if name == "gemma3":
        return {**inputs, "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)  # patches of 2 frames of 4 by 4 pixels
    kinds = (ids == IMAGE).int()
    return {**inputs, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": kinds}
