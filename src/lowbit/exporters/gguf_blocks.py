"""Codes as GGUF blocks: Q4_0, Q5_0, Q8_0 and, for groups of 256, the K types.

Nothing is rounded; ``block_type`` refuses formats that no type represents exactly. Each block has one float16 scale,
so groups are multiples of its width. Signed types hold ``n = code - zero``:

===== ====== ==================== ============================================================================
type  values ``n``                bytes
===== ====== ==================== ============================================================================
Q4_0  32     ``-8 .. 7``          scale; byte ``j``: ``n[j] + 8`` in the low half, ``n[j + 16] + 8`` in the high
Q5_0  32     ``-16 .. 15``        scale; 32 bits, bit ``j`` the fifth bit of ``n[j] + 16``; the low four as Q4_0
Q8_0  32     ``-128 .. 127``      scale; 32 int8
Q3_K  256    ``-4 .. 3``          32 of high bits; 64 of low pairs of bits; 12 of sub-scales; scale
Q6_K  256    ``-32 .. 31``        128 of low nibbles; 64 of high pairs of bits; 16 of sub-scales; scale
===== ====== ==================== ============================================================================

Types with an offset hold ``code`` and ``zero`` separately, as ``scale * code - scale * zero``:

===== ====== ==================== ============================================================================
Q2_K  256    2 bits, zero to 15   16 of sub-scales and zeros; 64 of pairs of bits; scale; scale of the zeros
Q4_K  256    4 bits, zero to 63   scale; scale of the zeros; 12 of sub-scales and zeros; 128 of nibbles
Q5_K  256    5 bits, zero to 63   as Q4_K, with 32 of high bits before the nibbles
===== ====== ==================== ============================================================================

K types give each 16 or 32 values a small integer that multiplies the scale; here it is always 1, since finer groups
would need scales that are multiples of one another. A product and a difference of such integers with a float16 scale
are exact in float32. Rejected: Q4_1, whose offset is rounded to float16 and so represents no free zero point exactly.
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q4_0 to block_q6_K)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from lowbit.checkpoints.gguf_types import Bytes
from lowbit.quant.format import QTensor
from lowbit.quant.integer import IntFormat

BLOCK = 32
# By size, the narrower block first among equals. Signed: range of n. With an offset: largest code and zero point.
SIGNED = {Kind.Q3_K: (-4, 3), Kind.Q4_0: (-8, 7), Kind.Q5_0: (-16, 15), Kind.Q6_K: (-32, 31), Kind.Q8_0: (-128, 127)}
OFFSET = {Kind.Q2_K: (3, 15), Kind.Q4_K: (15, 63), Kind.Q5_K: (31, 63)}
TYPES = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_0, Kind.Q4_K, Kind.Q5_0, Kind.Q5_K, Kind.Q6_K, Kind.Q8_0)


def block_type(format: IntFormat, columns: int) -> Kind | str:
    """The smallest type that represents every weight of a format exactly, or why there is none.

    >>> block_type(IntFormat(4, 64, symmetric=False), 128).name
    'Q5_0'
    >>> block_type(IntFormat(4, 256, symmetric=False), 512).name
    'Q4_K'
    """
    if columns % BLOCK:
        return f"rows of {columns} are not a multiple of {BLOCK}"
    if format.group is not None and format.group % BLOCK:
        return f"groups of {format.group} are not a multiple of {BLOCK}"
    if format.scale_dtype != torch.float16:
        return f"scales are {format.scale_dtype}, blocks hold float16"
    for kind in TYPES:
        if (format.group or columns) % width(kind) == 0 and _holds(kind, format):
            return kind
    span = f"{-format.levels} .. {format.levels}"
    return f"{format.bits}-bit codes with a free zero point span {span}, beyond the widest type's 127"


def width(kind: Kind) -> int:
    """Values in a block."""
    return int(GGML_QUANT_SIZES[kind][0])


def _holds(kind: Kind, format: IntFormat) -> bool:
    """Whether the type represents every code with every zero point."""
    half = 2 ** (format.bits - 1)
    if kind in OFFSET:
        code, zero = OFFSET[kind]
        return format.levels <= code and (half if format.symmetric else format.levels) <= zero
    low, high = (-half, half - 1) if format.symmetric else (-format.levels, format.levels)
    smallest, largest = SIGNED[kind]
    return smallest <= low and high <= largest


def pack_blocks(q: QTensor, kind: Kind) -> Bytes:
    """``uint8 (rows, bytes per row)`` that dequantize to ``q.dequantize()``, bit for bit."""
    rows, columns = q.codes.shape
    size, wide = columns // q.qparams.zero.shape[1], width(kind)
    codes = q.codes.numpy().astype(np.int16).reshape(rows, -1, wide)
    zeros = q.qparams.zero.numpy().astype(np.int16).repeat(size // wide, 1)[..., None]
    scales = q.qparams.scale.to(torch.float16).numpy().astype("<f2").repeat(size // wide, 1)[..., None].view(np.uint8)
    if kind in OFFSET:
        parts = _offset(kind, codes.astype(np.uint8), zeros.astype(np.uint8), scales)
    else:
        parts = _signed(kind, codes - zeros, scales)
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _signed(kind: Kind, n: npt.NDArray[np.int16], scale: Bytes) -> list[Bytes]:
    """The parts of blocks that hold ``n``, each ``uint8 (rows, blocks, bytes)``."""
    if kind == Kind.Q8_0:
        return [scale, n.astype(np.int8).view(np.uint8)]
    u = (n - SIGNED[kind][0]).astype(np.uint8)
    if kind == Kind.Q3_K:  # sub-scales are stored + 32: 33 has the low nibbles 1 and the high pairs of bits 2
        return [planes(u >> 2, 1), planes(u & 3, 2), _same([0x11] * 8 + [0xAA] * 4, scale), scale]
    if kind == Kind.Q6_K:
        low = (u & 15).reshape(*u.shape[:2], 2, 2, 64)
        nibbles = (low[..., 0, :] | low[..., 1, :] << 4).reshape(*u.shape[:2], -1)
        return [nibbles, planes(u >> 4, 2), _same([1] * 16, scale), scale]
    nibbles = u[..., :16] & 15 | (u[..., 16:] & 15) << 4
    return [scale, nibbles] if kind == Kind.Q4_0 else [scale, bits_of(u >> 4), nibbles]


def _offset(kind: Kind, codes: Bytes, zero: Bytes, scale: Bytes) -> list[Bytes]:
    """The parts of blocks that hold codes and zero points separately."""
    if kind == Kind.Q2_K:
        return [(1 | zero << 4).repeat(16, -1), planes(codes, 2), scale, scale]
    # Eight sub-scales and eight zeros of 6 bits: four bytes of each, then the low nibbles of the other four of both,
    # whose high bits are on top of the first eight bytes.
    packed = [_same([1] * 4, scale), (zero | (zero >> 4) << 6).repeat(4, -1), (1 | (zero & 15) << 4).repeat(4, -1)]
    high = [planes(codes >> 4, 1)] if kind == Kind.Q5_K else []
    return [scale, scale, *packed, *high, planes(codes & 15, 4)]


def planes(values: Bytes, bits: int) -> Bytes:
    """256 small values as planes of 32: a byte holds values 32 apart, the first in its lowest bits."""
    planes = values.reshape(*values.shape[:2], -1, 8 // bits, 32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(planes << shifts, axis=-2).reshape(*values.shape[:2], -1)


def bits_of(values: Bytes) -> Bytes:
    """One bit per value, value ``j`` in bit ``j``."""
    return np.packbits(values, axis=-1, bitorder="little")


def _same(content: list[int], like: Bytes) -> Bytes:
    """The same bytes in every block."""
    return np.broadcast_to(np.array(content, dtype=np.uint8), (*like.shape[:2], len(content)))
