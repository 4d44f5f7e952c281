"""Folders of compressed-tensors, llm-compressor's and our own (``quant_method: compressed-tensors``).

Layouts are those of ``lowbit.quant.layouts``, and more than a run folder has: integers of the versions before 0.18,
whose words of 32 bits hold whole values; zero points as they are (``int8``) or packed; groups in activation order
(``weight_g_idx``); a scale for the whole tensor; any number as NVFP4's scale of the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lowbit.errors import shown
from lowbit.quant.bit_stream import words
from lowbit.quant.float_layouts import unpack_bits
from lowbit.quant.floating import MXFP4, MXFP6, MXFP8, NVFP4, FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.kquants import K_QUANTS
from lowbit.quant.layouts import OWN
from lowbit.quant.tables import IQ4_NL, Q2_0
from lowbit.sources.compressed_config import Group, read_groups
from lowbit.sources.floats import grouped, powers, tiled, values
from lowbit.sources.integers import SCALES, dense, integers
from lowbit.sources.layout import (
    Decoded,
    FloatOnly,
    Headers,
    Read,
    SourceLayout,
    StoredWeight,
    expect,
    matrix,
    parts_of,
)

OWN_FORMATS: dict[str, Format] = {**K_QUANTS, IQ4_NL.name: IQ4_NL, Q2_0.name: Q2_0}
IN_BLOCKS: dict[str, FloatFormat] = {
    "nvfp4-pack-quantized": NVFP4,
    "mxfp4-pack-quantized": MXFP4,
    "mxfp6-pack-quantized": MXFP6,
    "mxfp8-quantized": MXFP8,
}
OPTIONAL = ("weight_zero_point", "weight_g_idx", "weight_global_scale")


@dataclass(frozen=True)
class CompressedTensors(SourceLayout):
    """A folder of compressed-tensors.

    Attributes:
        groups: the config groups.
        beside: what the source quantizes beside weights.
    """

    groups: tuple[Group, ...]
    beside: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Self:
        """See ``SourceLayout``."""
        groups = read_groups(config, where)
        inputs = any(group.get("input_activations") for group in config["config_groups"].values())
        beside = [
            *(["inputs of linears"] if inputs else []),
            *(["the KV cache"] if config.get("kv_cache_scheme") else []),
        ]
        return cls(groups, " and ".join(beside) or None)

    @property
    def summary(self) -> str:
        """Every group's format."""
        return f"compressed-tensors, {'; '.join(dict.fromkeys(group.summary for group in self.groups))}"

    @property
    def dropped(self) -> str | None:
        """Inputs and the KV cache."""
        return self.beside

    @property
    def dropped_tensors(self) -> tuple[str, ...]:
        """Scales, zero points and the order of groups of inputs and outputs."""
        kinds = ("scale", "zero_point", "global_scale", "g_idx")
        return tuple(f"{side}_{kind}" for side in ("input", "output") for kind in kinds)

    def weights(self, headers: Headers, read: Read) -> list[StoredWeight]:
        """See ``SourceLayout``: modules with ``weight_packed``, or with ``weight`` beside ``weight_scale``."""
        packed = [name.removesuffix("weight_packed") for name in headers if name.endswith(".weight_packed")]
        scaled = [name.removesuffix("weight_scale") for name in headers if name.endswith(".weight_scale")]
        said = read([name for name in headers if name.endswith(".weight_shape")])
        return [self._weight(headers, prefix, said) for prefix in dict.fromkeys([*packed, *scaled])]

    def _weight(self, headers: Headers, prefix: str, said: Mapping[str, Tensor]) -> StoredWeight:
        group = self._group(prefix.removesuffix("."))
        parts = parts_of(headers, prefix, _required(group), OPTIONAL)
        codes = parts.get("weight_packed") or parts["weight"]
        rows, columns = matrix(headers, codes)
        if "weight_shape" in parts:
            shape = said[parts["weight_shape"]].flatten().tolist()
            if len(shape) != 2 or shape[0] != rows or not 1 <= shape[1] <= columns * 32:
                raise ValueError(f"'{parts['weight_shape']}' says {shape[:3]}, '{codes}' is {[rows, columns]}")
            columns = shape[1]
        elif "weight_packed" in parts:
            columns = columns * 8 // int(group.bits)
        return StoredWeight(f"{prefix}weight", (rows, columns), parts)

    def _group(self, module: str) -> Group:
        named = next((group for group in self.groups if group.names(module)), None)
        found = named or next((group for group in self.groups if group.covers(module)), None)
        if found is None:
            raise ValueError(f"no config group names '{module}', which has codes")
        return found

    def unpack(self, weight: StoredWeight, parts: Mapping[str, Tensor]) -> Decoded:
        """See ``SourceLayout``."""
        group = self._group(weight.name.removesuffix(".weight"))
        if group.format == OWN.name:
            return OWN.unpack(parts, _own(group))
        if group.format in IN_BLOCKS:
            return _in_blocks(weight.shape, parts, IN_BLOCKS[group.format])
        if group.format == "float-quantized":
            return _floats(weight.shape, parts, group)
        return _integers(weight.shape, parts, group)


def _required(group: Group) -> tuple[str, ...]:
    """Names of the tensors that a weight must have."""
    if group.format == OWN.name:
        return OWN.tensors(_own(group))
    codes = ("weight_packed",) if group.format.endswith("pack-quantized") else ("weight",)
    shape = ("weight_shape",) if group.format == "pack-quantized" else ()
    outer = ("weight_global_scale",) if group.format == "nvfp4-pack-quantized" else ()
    zero = () if group.symmetric or group.floats else ("weight_zero_point",)
    return (*codes, "weight_scale", *shape, *outer, *zero)


def _own(group: Group) -> Format:
    if group.bits not in OWN_FORMATS:
        raise ValueError(f"the format {shown(group.bits)} of lowbit-packed is not known")
    return OWN_FORMATS[str(group.bits)]


def _in_blocks(shape: tuple[int, ...], parts: Mapping[str, Tensor], format: FloatFormat) -> Decoded:
    rows, columns = shape
    groups, width = columns // (format.group or columns), format.elements.bits
    if width == 8:
        expect("weight", parts["weight"], [torch.float8_e4m3fn], [rows, columns])
        bits = parts["weight"].view(torch.uint8)
    else:
        expect("weight_packed", parts["weight_packed"], [torch.uint8], [rows, columns * width // 8])
        bits = unpack_bits(parts["weight_packed"], width)
    if format is not NVFP4:
        expect("weight_scale", parts["weight_scale"], [torch.uint8], [rows, groups])
        return grouped(bits, powers(parts["weight_scale"]), format)
    expect("weight_scale", parts["weight_scale"], [torch.float8_e4m3fn], [rows, groups])
    outer = parts["weight_global_scale"]
    if outer.dtype != torch.float32 or outer.numel() != 1 or float(outer) <= 0:
        raise ValueError(
            f"weight_global_scale is {outer.dtype} {outer.flatten()[:3].tolist()}, allowed is a float32 above 0"
        )
    scale = parts["weight_scale"].to(torch.float32) / outer.reshape(1)
    if float(torch.frexp(outer).mantissa) == 0.5:
        return grouped(bits, scale, format)
    by_value = scale.repeat_interleave(columns // groups, -1)
    return FloatOnly(values(bits, format.elements) * by_value, "its tensor's scale is no power of two")


def _floats(shape: tuple[int, ...], parts: Mapping[str, Tensor], group: Group) -> Decoded:
    rows, columns = shape
    tiles = {"tensor": (0, 0), "channel": (1, 0), "block": group.block, "group": (1, group.group or 0)}
    if group.strategy not in tiles or group.bits != 8:
        raise ValueError(f"{group.bits} bits with the strategy {group.strategy} are not read")
    tile = tiles[group.strategy]
    expect("weight", parts["weight"], [torch.float8_e4m3fn], [rows, columns])
    due = [-(-rows // (tile[0] or rows)), -(-columns // (tile[1] or columns))]
    scale = _scale(parts["weight_scale"], due)
    return tiled(parts["weight"], scale, tile)


def _scale(scale: Tensor, due: list[int]) -> Tensor:
    """A scale in the shape that is due; one number may have any."""
    if due == [1, 1] and scale.numel() == 1:
        scale = scale.reshape(1, 1)
    expect("weight_scale", scale, SCALES, due)
    return scale


def _integers(shape: tuple[int, ...], parts: Mapping[str, Tensor], group: Group) -> Decoded:
    (rows, columns), bits = shape, int(group.bits)
    if group.strategy not in ("tensor", "channel", "group"):
        raise ValueError(f"integers with the strategy {group.strategy} are not read")
    if group.format == "int-quantized":
        expect("weight", parts["weight"], [torch.int8], [rows, columns])
        codes = parts["weight"].to(torch.int16) + 2 ** (bits - 1)
    else:
        codes = _packed(parts["weight_packed"], rows, columns, bits)
    if int(codes.min()) < 0 or int(codes.max()) > 2**bits - 1:
        raise ValueError(f"a code has more than {bits} bits")
    groups = -(-columns // (group.group or columns))
    due = [1, 1] if group.strategy == "tensor" else [rows, groups]
    scale = _scale(parts["weight_scale"], due).expand(rows, -1)
    zero = None if group.symmetric else _zero(parts["weight_zero_point"], rows, groups, bits)
    order = parts.get("weight_g_idx")
    if order is not None and bool((order == -1).all()):
        order = None  # how the library writes that there is none
    return integers(codes, scale, zero, bits, group.group, order)


def _packed(packed: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """Unsigned codes ``int16 (rows, columns)`` of dense words, or of older ones that hold whole values."""
    in_word = 32 // bits
    older = -(-columns // in_word)
    if packed.shape[1] == older != words(columns, bits):
        expect("weight_packed", packed, [torch.int32], [rows, older])
        shifts = bits * torch.arange(in_word)
        return (packed.long()[..., None] >> shifts & 2**bits - 1).flatten(1)[:, :columns].to(torch.int16)
    expect("weight_packed", packed, [torch.int32], [rows, words(columns, bits)])
    return dense(packed, bits, rows, columns)


def _zero(stored: Tensor, rows: int, groups: int, bits: int) -> Tensor:
    """Unsigned zero points ``(rows, groups)``, packed along the rows or one an int8."""
    middle = 2 ** (bits - 1)
    if stored.dtype == torch.int32:
        in_word = 32 // bits
        older = -(-rows // in_word)
        due = older if stored.shape[:1] == (older,) else words(rows, bits)
        expect("weight_zero_point", stored, [torch.int32], [due, groups])
        return _packed(stored.T, groups, rows, bits).T
    plain = stored.reshape(1, 1).expand(rows, groups) if stored.numel() == 1 else stored
    expect("weight_zero_point", plain, [torch.int8], [rows, groups])
    return plain.to(torch.int16) + middle
