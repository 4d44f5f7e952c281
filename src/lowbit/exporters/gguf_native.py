"""llama.cpp's own formats as GGUF blocks: K-quants with all their sub-scales, IQ4_NL, Q2_0, MXFP4, NVFP4.

Codes, sub-scales and factors are stored as they are; nothing is rounded. Parts of a block of 256 values:

===== =========================================================================================================
Q2_K  16 bytes: scale in the low half, minimum in the high; pairs of bits; ``d``; ``dmin``
Q3_K  high bits; low pairs of bits; 16 scales + 32 of 6 bits; ``d``
Q4_K  ``d``; ``dmin``; 8 scales and 8 minima of 6 bits; nibbles
Q5_K  ``d``; ``dmin``; as Q4_K; high bits; nibbles
Q6_K  low nibbles; high pairs of bits; 16 scales of 8 bits; ``d``
===== =========================================================================================================

NVFP4 has no place for the scale of the tensor in its blocks: llama.cpp reads it from a tensor of one float32 beside
it, ``NAME.scale``, a multiplier. https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lowbit.checkpoints.gguf_types import SIZES, AnyKind, Bytes, OwnKind, pack_q2_0
from lowbit.exporters.gguf_blocks import planes
from lowbit.quant.floating import MXFP4, NVFP4
from lowbit.quant.format import Format, QTensor
from lowbit.quant.kquants import SUPERBLOCK, KQuant
from lowbit.quant.own_layout import levels_of
from lowbit.quant.scales import PowerOfTwo, TwoLevel
from lowbit.quant.tables import IQ4_NL, Q2_0

NATIVE: dict[str, AnyKind] = {
    "q2_k": Kind.Q2_K,
    "q3_k": Kind.Q3_K,
    "q4_k": Kind.Q4_K,
    "q5_k": Kind.Q5_K,
    "q6_k": Kind.Q6_K,
    IQ4_NL.name: Kind.IQ4_NL,
    Q2_0.name: OwnKind.Q2_0,
    MXFP4.name: Kind.MXFP4,
    NVFP4.name: Kind.NVFP4,
}


def native_type(format: Format, columns: int) -> AnyKind | str | None:
    """The type of a format of llama.cpp's own, or why a width has none; ``None`` for other formats."""
    kind = NATIVE.get(format.name)
    if kind is not None and columns % SIZES[kind][0]:
        return f"rows of {columns} are not a multiple of {SIZES[kind][0]}, the width of its blocks"
    return kind


def pack_native(q: QTensor, exponent: int = 0) -> Bytes:
    """``uint8 (rows, bytes per row)`` that dequantize to ``q.dequantize()``, bit for bit.

    Args:
        q: the weight.
        exponent: of NVFP4's power of two for the tensor, which the file holds beside the blocks.
    """
    rows = len(q.codes)
    if isinstance(q.format, KQuant):
        parts = _superblocks(q, q.format)
    else:
        parts = _small_blocks(q, exponent)
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _superblocks(q: QTensor, format: KQuant) -> list[Bytes]:
    rows, columns = q.codes.shape
    shape = (rows, columns // SUPERBLOCK)
    codes = q.codes.numpy().reshape(*shape, SUPERBLOCK)
    scales, factor = levels_of(q.qparams.scale, format)
    sc, d = scales.numpy().reshape(*shape, -1), _halves(factor)
    if not format.has_minimum:
        return _symmetric(format.bits, codes, sc, d)
    minima, minimum_factor = levels_of(q.qparams.zero, format)
    m, dmin = minima.numpy().reshape(*shape, -1), _halves(minimum_factor)
    if format.bits == 2:
        return [sc | m << 4, planes(codes, 2), d, dmin]
    high = [planes(codes >> 4, 1)] if format.bits == 5 else []
    return [d, dmin, _six_bits(sc, m), *high, planes(codes & 15, 4)]


def _symmetric(bits: int, codes: Bytes, sc: Bytes, d: Bytes) -> list[Bytes]:
    if bits == 6:
        low = (codes & 15).reshape(*codes.shape[:2], 2, 2, 64)
        nibbles = (low[..., 0, :] | low[..., 1, :] << 4).reshape(*codes.shape[:2], -1)
        return [nibbles, planes(codes >> 4, 2), sc, d]
    shifted = sc + 32  # stored without sign: a nibble each for 16 scales, then their high pairs of bits
    low = shifted[..., :8] & 15 | (shifted[..., 8:] & 15) << 4
    pairs = (shifted >> 4).reshape(*sc.shape[:2], 4, 4)
    high = np.bitwise_or.reduce(pairs << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=-2)
    return [planes(codes >> 2, 1), planes(codes & 3, 2), low, high, d]


def _six_bits(sc: Bytes, m: Bytes) -> Bytes:
    """Eight scales and eight minima: four bytes of each, then the low nibbles of the other four of both."""
    first = sc[..., :4] | (sc[..., 4:] >> 4) << 6
    second = m[..., :4] | (m[..., 4:] >> 4) << 6
    return np.concatenate([first, second, sc[..., 4:] & 15 | (m[..., 4:] & 15) << 4], axis=-1)


def _halves(factor: Tensor) -> Bytes:
    """Float16 factors ``(rows, blocks)`` as bytes ``(rows, blocks, 2)``."""
    return factor.to(torch.float16).numpy().astype("<f2")[..., None].view(np.uint8)


def _small_blocks(q: QTensor, exponent: int) -> list[Bytes]:
    rows = len(q.codes)
    if q.format.name == IQ4_NL.name:
        return [_halves(q.qparams.scale), _interleaved(q.codes.numpy().reshape(rows, -1, 32), 16)]
    if q.format.name == Q2_0.name:
        return [pack_q2_0(q.codes.numpy().reshape(rows, -1, 64), _halves(q.qparams.scale))]
    format = MXFP4 if q.format.name == MXFP4.name else NVFP4
    codes = format.elements.to_bits(q.codes).numpy().reshape(rows, -1, SIZES[NATIVE[format.name]][0])
    if isinstance(format.scales, PowerOfTwo):
        return [format.scales.to_bytes(q.qparams.scale).numpy()[..., None], _interleaved(codes, 16)]
    assert isinstance(format.scales, TwoLevel)
    inner = format.scales.split(q.qparams.scale, exponent).view(torch.uint8).numpy().reshape(rows, -1, 4)
    sub = codes.reshape(*codes.shape[:2], 4, 16)
    return [inner, _interleaved(sub, 8).reshape(*codes.shape[:2], -1)]


def _interleaved(codes: Bytes, half: int) -> Bytes:
    """Two codes a byte: value ``j`` in the low half, value ``j + half`` in the high."""
    out: npt.NDArray[np.uint8] = codes[..., :half] | codes[..., half:] << 4
    return out
