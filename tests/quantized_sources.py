"""Tiny models as other tools store them quantized, with the values that each weight must decode to.

Codes are packed here bit by bit, from the description of each layout, or by the layout's own library; never by the
code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny import save_tiny

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Packed = tuple[dict[str, Tensor], Tensor]  # tensors by what follows the module's name and a dot; values (out, in)
Pack = Callable[[Tensor, torch.Generator], Packed]
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}


def save_quantized(
    folder: Path, pack: Pack, config: dict[str, Any], family: str = "llama", head: bool = False, **sizes: Any
) -> dict[str, Tensor]:
    """A tiny model whose linears ``pack`` stores; returns the float32 value of every parameter by name."""
    save_tiny(folder, family, **{**SIZES, **sizes})
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "embed" not in name and (head or "lm_head" not in name):
            module = name.removesuffix("weight")
            packed, values[name] = pack(tensor.float(), generator)
            stored |= {module + key: value.contiguous() for key, value in packed.items()}
        else:
            stored[name] = values[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    set_quantization(folder, config)
    return values


def set_quantization(folder: Path, config: Any) -> None:
    """Put a ``quantization_config`` into a folder's config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def draw(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    """Random codes below ``high``."""
    return torch.randint(0, high, shape, generator=generator)


def words_of(values: Tensor, bits: int) -> Tensor:
    """Unsigned values ``(rows, n)`` as int32 words, one bit after the other, the lowest first."""
    ones = (values[..., None] >> torch.arange(bits) & 1).flatten(1)
    ones = torch.nn.functional.pad(ones, (0, -ones.shape[1] % 32)).unflatten(1, (-1, 32))
    return (ones.long() << torch.arange(32)).sum(-1).to(torch.int32)


def grid(weight: Tensor, generator: torch.Generator, bits: int, size: int, symmetric: bool) -> tuple[Tensor, ...]:
    """Random codes ``(out, in)``, float16 scales and zero points ``(out, groups)`` of about the weight's size."""
    rows, columns = weight.shape
    groups = columns // size
    codes = draw(generator, 2**bits, rows, columns)
    codes[0, :2] = torch.tensor([0, 2**bits - 1])
    zero = torch.full((rows, groups), 2 ** (bits - 1)) if symmetric else draw(generator, 2**bits, rows, groups)
    peak = weight.unflatten(1, (groups, size)).abs().amax(-1)
    return codes, (peak / 2 ** (bits - 1)).half(), zero


def values_of(codes: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor) -> Tensor:
    """``(code - zero) * scale``, the group of each column given."""
    return (codes.float() - zero[:, group_of].float()) * scale.float()[:, group_of]


def gptq(bits: int = 4, size: int = 32, symmetric: bool = True, v2: bool = False, order: bool = False) -> Pack:
    """GPTQ; ``order``: groups in activation order."""

    def pack(weight: Tensor, generator: torch.Generator) -> Packed:
        codes, scale, zero = grid(weight, generator, bits, size, symmetric)
        group_of = torch.arange(weight.shape[1]) // size
        if order:
            group_of = group_of[torch.randperm(len(group_of), generator=generator)]
        stored_zero = zero if v2 else (zero - 1) % 2**bits
        tensors = {
            "qweight": words_of(codes.T.T, bits).T,
            "qzeros": words_of(stored_zero.T, bits),
            "scales": scale.T,
            "g_idx": group_of.to(torch.int32),
        }
        return tensors, values_of(codes, scale, zero, group_of)

    return pack


def gptq_config(bits: int = 4, size: int = 32, v2: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        **more,
    }


def awq(weight: Tensor, generator: torch.Generator) -> Packed:
    """AWQ's GEMM order, groups of 32."""
    codes, scale, zero = grid(weight, generator, 4, 32, False)

    def words(values: Tensor) -> Tensor:
        eights = values.T.unflatten(1, (-1, 8))
        out = torch.zeros(eights.shape[:2], dtype=torch.long)
        for place, output in enumerate(AWQ_ORDER):
            out |= eights[..., output] << 4 * place
        return out.to(torch.int32)

    tensors = {"qweight": words(codes), "qzeros": words(zero), "scales": scale.T}
    return tensors, values_of(codes, scale, zero, torch.arange(weight.shape[1]) // 32)


AWQ_CONFIG = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
MXFP4_CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def fp8(weight: Tensor, generator: torch.Generator) -> Packed:
    """FP8 by the formula of DeepSeek: 448 is the largest of a tile of 128 x 128, smaller at the edges."""
    rows, columns = weight.shape
    scale, value = torch.empty(-(-rows // 128), -(-columns // 128)), torch.empty_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            tile = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale[i, j] = weight[tile].abs().max() / 448
            codes[tile] = (weight[tile] / scale[i, j]).to(torch.float8_e4m3fn)
            value[tile] = codes[tile].float() * scale[i, j]
    return {"weight": codes, "weight_scale_inv": scale}, value


def mxfp4(weight: Tensor, generator: torch.Generator) -> Packed:
    """A linear in gpt-oss's layout."""
    rows, columns = weight.shape
    codes = draw(generator, 16, rows, columns).to(torch.uint8)
    scale = draw(generator, 4, rows, columns // 32).to(torch.uint8) + 121
    value = E2M1[codes.long()] * (2.0 ** (scale.float() - 127)).repeat_interleave(32, 1)
    pairs = (codes[:, 0::2] | codes[:, 1::2] << 4).unflatten(1, (-1, 16))
    return {"weight_blocks": pairs, "weight_scales": scale}, value
