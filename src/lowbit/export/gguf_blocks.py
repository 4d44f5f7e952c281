"""Codes as GGUF blocks: Q4_0, Q5_0, Q8_0. Nothing is rounded; a grid that a type cannot hold never gets here.

All three store one float16 scale for 32 consecutive values and ``n = code - zero`` in 4, 5 or 8 signed bits, so that
a grid is held exactly where ``n`` fits for every code and zero, groups are multiples of 32 and scales are float16:

===== =================== ====================================================================================
type  ``n``               34, 22 or 18 bytes for 32 values
===== =================== ====================================================================================
Q4_0  ``-8 .. 7``         scale; byte ``j``: ``n[j] + 8`` in the low half, ``n[j + 16] + 8`` in the high half
Q5_0  ``-16 .. 15``       scale; 32 bits, bit ``j`` the fifth bit of ``n[j] + 16``; the low four as in Q4_0
Q8_0  ``-128 .. 127``     scale; 32 int8
===== =================== ====================================================================================

Rejected: Q4_1, whose offset ``-scale * zero`` is rounded to float16, so that it holds no free zero exactly.
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q4_0, block_q5_0, block_q8_0)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind

from lowbit.quant import QTensor, QuantSpec

BLOCK = 32
RANGES = {Kind.Q4_0: (-8, 7), Kind.Q5_0: (-16, 15), Kind.Q8_0: (-128, 127)}


def block_type(spec: QuantSpec, columns: int) -> Kind | str:
    """The smallest type that holds every grid of a format exactly, or why there is none.

    >>> block_type(QuantSpec(4, 64, symmetric=False), 128).name
    'Q5_0'
    """
    if columns % BLOCK:
        return f"rows of {columns} are not a multiple of {BLOCK}"
    if spec.group_size is not None and spec.group_size % BLOCK:
        return f"groups of {spec.group_size} are not a multiple of {BLOCK}"
    if spec.scale_dtype != torch.float16:
        return f"scales are {spec.scale_dtype}, blocks hold float16"
    half = 2 ** (spec.bits - 1)
    low, high = (-half, half - 1) if spec.symmetric else (-spec.levels, spec.levels)
    for kind, (least, most) in RANGES.items():
        if least <= low and high <= most:
            return kind
    return f"{spec.bits}-bit codes with a free zero span {low} .. {high}, the widest type holds -128 .. 127"


def pack_blocks(q: QTensor, kind: Kind) -> npt.NDArray[np.uint8]:
    """``uint8 (rows, bytes of a row)`` that dequantize to ``q.dequantize()``, bit for bit."""
    rows, columns = q.codes.shape
    size = columns // q.grid.zero.shape[1]
    zero = q.grid.zero.to(torch.int16).repeat_interleave(size, 1)
    n = (q.codes.to(torch.int16) - zero).numpy().reshape(rows, -1, BLOCK)
    scale = q.grid.scale.to(torch.float16).repeat_interleave(size // BLOCK, 1).numpy().astype("<f2")
    parts = [np.ascontiguousarray(scale[..., None]).view(np.uint8), *_values(n, kind)]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _values(n: npt.NDArray[np.int16], kind: Kind) -> list[Any]:
    """The parts of a block behind its scale, ``uint8 (rows, blocks, bytes)``."""
    if kind == Kind.Q8_0:
        return [n.astype(np.int8).view(np.uint8)]
    unsigned = (n - RANGES[kind][0]).astype(np.uint8)
    low = unsigned & 0x0F
    nibbles = low[..., :16] | (low[..., 16:] << 4)
    if kind == Kind.Q4_0:
        return [nibbles]
    return [np.packbits(unsigned >> 4, axis=-1, bitorder="little"), nibbles]
