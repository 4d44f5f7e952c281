"""The blocks that ``fit_step.py`` measures: a real one, and one of a larger model's shape with random weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lowbit.checkpoints.resolve import load_config, load_tokenizer, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint, block_params
from lowbit.data.text import calibration
from lowbit.models.block import Block, Calib
from lowbit.models.families import architecture_of
from lowbit.models.forward import run_all
from lowbit.models.skeleton import Skeleton

LIKE = {"7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}}


def first_block(
    tokens: int, device: str, dtype: torch.dtype = torch.float32, length: int = 256
) -> tuple[Block, Calib]:
    """Block 0 with its input for ``tokens`` tokens of built-in text in sequences of ``length``."""
    folder = resolve("demo").folder
    skeleton, checkpoint = Skeleton(load_config(folder)), Checkpoint(folder)
    rest = checkpoint.read(skeleton.shared_names)
    skeleton.fill({n: value.float().to(device, dtype) for n, value in rest.items()})
    skeleton.model.to(device)
    ids = calibration("builtin", load_tokenizer(folder), tokens // length, length, 0).ids.to(device)
    x = skeleton.embed(ids)
    params = block_params(checkpoint, skeleton.architecture.blocks, 0, skeleton.parameter_shapes(0))
    block = skeleton.block(0, {name: value.to(device) for name, value in params.items()})
    return block, Calib(x, x, run_all(block, x))


def random_block(size: str, tokens: int, device: str, dtype: torch.dtype, length: int) -> tuple[Block, Calib]:
    """A Llama block of the shape of ``LIKE`` with random weights and inputs; a few channels are outliers."""
    config = LlamaConfig(**LIKE[size], vocab_size=32, num_hidden_layers=1, max_position_embeddings=max(4096, length))
    config.architectures, config._attn_implementation = ["LlamaForCausalLM"], "sdpa"
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0).eval()
    generator = torch.Generator(device).manual_seed(0)

    def made(shape: Sequence[int]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(*shape, device=device)
        return torch.randn(*shape, generator=generator, device=device) / shape[1] ** 0.5

    params = {f"0.{name}": made(value.shape) for name, value in layer.named_parameters()}
    x = torch.randn(tokens // length, length, config.hidden_size, generator=generator, device=device)
    x[..., :: config.hidden_size // 8] *= 20.0
    x = x.to(dtype)
    at = torch.arange(length, device=device)[None]
    rotary = LlamaRotaryEmbedding(config).to(device)(x[:1], at)
    architecture = architecture_of(config)
    kwargs = ({"position_embeddings": rotary},)
    block = Block((layer,), 0, kwargs, architecture.layers, architecture.blocks, params)
    return block, Calib(x, x, run_all(block, x, batch=1))
