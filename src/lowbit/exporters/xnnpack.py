"""How XNNPACK stores a quantized weight, and which formats it represents.

========== ======================= =========================== ==================
store      codes                   scales                      formats
========== ======================= =========================== ==================
``qbint4`` int4, groups of ``32k`` bfloat16, one per group     sym 2-4, asym 2-3
``qcint8`` int8                    float32, one per row        sym 5-8, asym 4-7
========== ======================= =========================== ==================

It stores ``code - zero``, so zero points cost nothing where the difference fits. A row of int4 with one scale is a
group of its width: ``executorch`` 1.5 does not make XNNPACK's ``qcint4``, which would have a float32 scale
(``backends/xnnpack/operators/quant_params.py``). An embedding is int8 with float32 scales, and no part of XNNPACK's
graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quant.format import QParams, QTensor
from lowbit.quant.integer import IntFormat, integer

BLOCK = 32


def stored_bits(format: IntFormat) -> int:
    """Bits of a stored ``code - zero``: 4 or 8."""
    return 4 if format.bits <= (4 if format.symmetric else 3) else 8


def why_not(format: IntFormat, columns: int | None) -> str | None:
    """Why XNNPACK does not support a format for rows of ``columns`` values; ``None`` if it does.

    ``columns`` is ``None`` for an embedding, which is int8 with float32 scales for groups of any size.

    >>> why_not(IntFormat(4, 64), 128), why_not(IntFormat(4, 16), 128)
    (None, 'groups of 16, XNNPACK supports multiples of 32')
    >>> why_not(IntFormat(4), 100), why_not(IntFormat(8), 100)
    ('int4 rows of 100 values, XNNPACK supports multiples of 32', None)
    """
    size = format.group
    if format.bits == 8 and not format.symmetric:
        return "asymmetric codes of 8 bits take 9"
    if columns is None:
        return None
    if stored_bits(format) == 8:
        if size in (None, columns):
            return None
        kind = "" if format.symmetric else "asymmetric "
        return f"{kind}{format.bits} bits are stored as int8, which has one scale per row"
    if size in (None, columns):
        return f"int4 rows of {columns} values, XNNPACK supports multiples of {BLOCK}" if columns % BLOCK else None
    if size % BLOCK or columns % size:
        return f"groups of {size}, XNNPACK supports multiples of {BLOCK}"
    return None


def rounds_scales(format: IntFormat) -> bool:
    """Whether XNNPACK may round the scales of a linear: those of int4 become bfloat16."""
    return stored_bits(format) == 4 and format.scale_dtype != torch.bfloat16


def signed_codes(q: QTensor) -> Tensor:
    """``code - zero`` as int8 ``(out, in)``.

    >>> qparams = QParams(torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    >>> signed_codes(QTensor(torch.tensor([[0, 2, 3]], dtype=torch.uint8), qparams, IntFormat(2))).tolist()
    [[-2, 0, 1]]
    """
    zero = q.qparams.zero.repeat_interleave(q.codes.shape[1] // q.qparams.zero.shape[1], 1)
    return (q.codes.to(torch.int16) - zero.to(torch.int16)).to(torch.int8)


def stored(q: QTensor) -> QTensor:
    """A linear's weight as XNNPACK stores it: equal except for float16 scales of int4, which become bfloat16."""
    if not rounds_scales(integer(q.format, "XNNPACK")):
        return q
    scale, zero = q.qparams
    return QTensor(q.codes, QParams(scale.to(torch.bfloat16).to(scale.dtype), zero), q.format)


def unpack(data: bytes, scales: bytes, kind: str, shape: tuple[int, int]) -> Tensor:
    """Values ``(out, in)`` of a stored weight, in float32; ``kind`` is its name in the table above.

    >>> unpack(bytes([0x79, 0x80]), b"\\x00\\x3f", "qbint4", (1, 4)).tolist()
    [[0.5, -0.5, -4.0, 0.0]]
    """
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if kind == "qcint8":
        codes, dtype = raw.view(torch.int8).to(torch.float32), torch.float32
    elif kind == "qbint4":
        codes, dtype = torch.stack([raw & 15, raw >> 4], -1).to(torch.float32) - 8, torch.bfloat16
    else:
        raise ValueError(f"a constant has the type {kind}")
    scale = torch.frombuffer(bytearray(scales), dtype=dtype).to(torch.float32)
    rows, columns = shape
    grouped = codes.flatten()[: rows * columns].reshape(rows, len(scale) // rows, -1)
    return (grouped * scale.reshape(rows, -1, 1)).reshape(rows, columns)
