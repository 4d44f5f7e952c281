"""Quantized weights in the integer formats of MatMulNBits: 2, 4 or 8 bits, blocks of a power of two.

Operator: com.microsoft.MatMulNBits, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
Nothing is rounded: codes and zero points of 3, 5, 6 and 7 bits are shifted together into 4 or 8 bits, and a group
that is larger than a block becomes several blocks with one scale.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.quant.format import QParams, QTensor
from lowbit.quant.integer import integer
from lowbit.quant.runtimes import onnx_block

SMALLEST = 16


def stored_bits(bits: int) -> int:
    """The bits per code in the file.

    >>> [stored_bits(b) for b in range(2, 9)]
    [2, 4, 4, 8, 8, 8, 8]
    """
    return next(stored for stored in (2, 4, 8) if bits <= stored)


def block_of(group: int) -> int | None:
    """The block size for groups of that size; ``None`` where the operator has none.

    >>> block_of(128), block_of(48), block_of(40)
    (128, 16, None)
    """
    block = onnx_block(group)
    return block if block >= SMALLEST else None


def in_blocks(q: QTensor) -> QTensor:
    """The same values in the integer format that MatMulNBits stores.

    >>> import torch
    >>> from lowbit.quant.integer import IntFormat
    >>> codes = torch.arange(48, dtype=torch.uint8)[None] % 8
    >>> q = QTensor(codes, QParams(torch.ones(1, 1), torch.full((1, 1), 4.0)), IntFormat(3))
    >>> stored = in_blocks(q)
    >>> stored.format.bits, stored.format.group, stored.qparams.zero.tolist()
    (4, 16, [[8.0, 8.0, 8.0]])
    >>> torch.equal(stored.dequantize(), q.dequantize())
    True
    """
    columns = q.codes.shape[1]
    format = integer(q.format, "MatMulNBits")
    group = format.group or columns
    block, bits = block_of(group) or group, stored_bits(format.bits)
    # a symmetric format's zero point stays in the middle, the operator's default
    up = 2 ** (bits - 1) - format.middle
    scale, zero = (x.repeat_interleave(group // block, 1) for x in q.qparams)
    return QTensor(q.codes + up, QParams(scale, zero + up), replace(format, bits=bits, group=block))
