"""Floating-point codes with scales for rows, tiles or groups, whatever tensors they come from, as a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.quant.elements import Float
from lowbit.quant.floating import FP8, FP8_BLOCK, FP8_TENSOR, FloatFormat
from lowbit.quant.format import QParams, QTensor
from lowbit.quant.scales import Plain, PowerOfTwo
from lowbit.sources.layout import Decoded, FloatOnly

NAN_SCALE = 255  # of E8M0
# By the rows and columns that share a scale; 0: all.
TILED: Mapping[tuple[int, int], FloatFormat] = {(1, 0): FP8, (0, 0): FP8_TENSOR, (128, 128): FP8_BLOCK}


def halves(packed: Tensor) -> Tensor:
    """Codes of 4 bits, two in each byte of the last dimension, the low half first.

    >>> halves(torch.tensor([0xC6], dtype=torch.uint8)).tolist()
    [6, 12]
    """
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def powers(stored: Tensor) -> Tensor:
    """E8M0 bytes as float32; raises ``ValueError`` for a NaN.

    >>> powers(torch.tensor([127, 128], dtype=torch.uint8)).tolist()
    [1.0, 2.0]
    """
    if bool((stored == NAN_SCALE).any()):
        raise ValueError("a scale is NaN (byte 255)")
    return PowerOfTwo().from_bytes(stored)


def grouped(bits: Tensor, scale: Tensor, format: FloatFormat) -> QTensor:
    """A weight of bit patterns ``uint8 (rows, columns)`` with float32 scales ``(rows, groups)``."""
    middle = torch.full_like(scale, format.middle)
    return QTensor(format.elements.from_bits(bits), QParams(scale, middle), format)


def values(bits: Tensor, element: Float) -> Tensor:
    """What bit patterns mean before their scale, float32."""
    return element.value(element.from_bits(bits).to(torch.float32))


def tiled(weight: Tensor, scale: Tensor, tile: tuple[int, int]) -> Decoded:
    """A weight in FP8 with a scale for each tile.

    Args:
        weight: ``float8_e4m3fn (..., rows, columns)``.
        scale: a float for each tile, ``(..., ceil(rows / tile rows), ceil(columns / tile columns))``.
        tile: rows and columns of a tile, 0 for all; those at the right and lower edge may be smaller.
    """
    rows, columns = weight.shape[-2:]
    high, wide = tile[0] or rows, tile[1] or columns
    by_row = scale.to(torch.float32).repeat_interleave(high, -2)[..., :rows, :]
    kind = TILED.get(tile)
    if weight.ndim == 2 and kind is not None:
        format = replace(kind, scales=Plain(scale.dtype))
        return grouped(weight.view(torch.uint8), by_row.contiguous(), format)
    by_value = by_row.repeat_interleave(wide, -1)[..., :columns]
    why = f"no format has tiles of {high} x {wide}" if kind is None else f"it has {weight.ndim} dimensions"
    return FloatOnly(weight.to(torch.float32) * by_value, why)
