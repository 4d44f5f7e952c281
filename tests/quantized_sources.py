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
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
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


def auto_fp8(weight: Tensor, generator: torch.Generator) -> Packed:
    """FP8 as AutoFP8 stores it: a number for the tensor, and one for its inputs."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.float() * scale


AUTO_FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}


def mxfp4(weight: Tensor, generator: torch.Generator) -> Packed:
    """A linear in gpt-oss's layout."""
    rows, columns = weight.shape
    codes = draw(generator, 16, rows, columns).to(torch.uint8)
    scale = draw(generator, 4, rows, columns // 32).to(torch.uint8) + 121
    value = E2M1[codes.long()] * (2.0 ** (scale.float() - 127)).repeat_interleave(32, 1)
    pairs = (codes[:, 0::2] | codes[:, 1::2] << 4).unflatten(1, (-1, 16))
    return {"weight_blocks": pairs, "weight_scales": scale}, value


def scheme_of(**weights: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def compressed(
    format: str, args: dict[str, Any], dtype: torch.dtype = torch.float32, power_of_two: bool = False
) -> Pack:
    """Packs by the library's own compressor; values are those of its decompressor where it computes in float32.

    Args:
        format: the layout's name.
        args: of ``QuantizationArgs``.
        dtype: of integers' scales.
        power_of_two: whether NVFP4's scale of the tensor is one.
    """

    def pack(weight: Tensor, generator: torch.Generator) -> Packed:
        scheme, compressor = scheme_of(**args), BaseCompressor.get_value_from_registry(format)
        size = args.get("group_size") or weight.shape[1]
        bits, peak = args["num_bits"], weight.unflatten(1, (-1, size)).abs().amax(-1)
        state = {"weight": weight}
        if args["type"] == "int":
            state["weight_scale"] = (peak / 2 ** (bits - 1)).to(dtype)
            if not args["symmetric"]:
                zero = draw(generator, 2**bits, *peak.shape) - 2 ** (bits - 1)
                state["weight_zero_point"] = zero.to(torch.int8)
        elif format == "nvfp4-pack-quantized":
            outer = torch.tensor([448 * 6 / weight.abs().max()])
            state["weight_global_scale"] = 2.0 ** outer.log2().floor() if power_of_two else outer
            state["weight_scale"] = (state["weight_global_scale"] * peak / 6).to(torch.float8_e4m3fn).float()
        elif args["strategy"] == "block":
            peak = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3))
            state["weight_scale"] = peak / 448
        elif args["strategy"] == "tensor":
            state["weight_scale"] = weight.abs().max().reshape(1) / 448
        elif format.startswith("mx"):
            state["weight_scale"] = 2.0 ** torch.floor(torch.log2(peak) - (8 if bits == 8 else 2))
        else:
            state["weight_scale"] = peak / 448
        made = compressor.compress(state, scheme)
        if format == "nvfp4-pack-quantized":
            codes = torch.stack([made["weight_packed"] & 15, made["weight_packed"] >> 4], -1).flatten(1).long()
            scale = made["weight_scale"].float() / made["weight_global_scale"]
            return made, E2M1[codes] * scale.repeat_interleave(16, 1)
        # The library multiplies in the dtype of the scale.
        wide = {**made, "weight_scale": made["weight_scale"].float()} if args["type"] == "int" else dict(made)
        value = compressor.decompress(wide, scheme)["weight"].float()
        return made, value

    return pack


def compressed_config(format: str, args: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": args, "input_activations": None, "format": format}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


def ints(bits: int, size: int | None, symmetric: bool) -> dict[str, Any]:
    strategy = "group" if size else "channel"
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": size}


def floats(bits: int, strategy: str, size: int | None = None, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "group_size": size, **more}
