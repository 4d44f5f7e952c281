"""Quantized weights as the inputs of a standard DequantizeLinear: ``value = (code - zero point) * scale``.

========================= ======================= ==============================================================
format                    codes                   scale
========================= ======================= ==============================================================
integers of 2 to 4 bits   int4, uint4             the format's
integers of 5 to 8 bits   int8, uint8             the format's
FP8, MXFP8                float8e4m3fn            the format's
MXFP4, NVFP4              int8: element times 2   half of the format's: 0.5 is the smallest step of E2M1
MXFP6                     int8: element times 8   an eighth
IQ4_NL, Q2_0              int8, int4: element     the format's, of either sign
``q3_k``, ``q6_k``        int4, int8              the product of both levels
========================= ======================= ==============================================================

onnxruntime has no FP4 on the CPU; an element's integer multiple and a power of two less in the scale are the same
product, so every value is equal in float32. K-quants with minima have none: a minimum is no integer zero point.
int8 codes have explicit zero points of 0, if they go beyond ``SHORT``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.elements import E4M3, Float
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format, QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import KQuant
from lowbit.quant.tables import TableFormat

FP8 = "FLOAT8E4M3FN"
FITS = {"INT4": (-8, 7), "INT8": (-128, 127)}
# onnxruntime turns int8 beyond these into uint8 where it is told to keep sums exact on AVX2, and gives them a zero
# point of a shape that DequantizeLinear refuses, unless they have one of their own.
SHORT = (-64, 63)


def unit_of(element: Float) -> float:
    """The number of which all elements are integer multiples: the step of the subnormal ones.

    >>> from lowbit.quant.elements import E2M1, E2M3
    >>> unit_of(E2M1), unit_of(E2M3)
    (0.5, 0.125)
    """
    return 2.0 ** (element.smallest_exponent - element.mantissa)


def kind_of(format: Format) -> str | None:
    """The ONNX element type of a format's codes; ``None`` if standard operators have no such values.

    >>> from lowbit.quant.floating import MXFP4
    >>> from lowbit.quant.kquants import k_quant
    >>> kind_of(IntFormat(3, symmetric=False)), kind_of(MXFP4), kind_of(k_quant("q3_k")), kind_of(k_quant("q4_k"))
    ('UINT4', 'INT8', 'INT4', None)
    """
    if isinstance(format, IntFormat):
        return f"{'' if format.symmetric else 'U'}INT{4 if format.bits <= 4 else 8}"
    if isinstance(format, FloatFormat) and format.elements == E4M3:
        return FP8
    if (steps := _steps(format)) is None:
        return None
    low, high = min(steps), max(steps)
    return next((kind for kind, (least, most) in FITS.items() if least <= low and high <= most), None)


def _steps(format: Format) -> tuple[int, ...] | None:
    """The integer of each code, whose product with a scale is the value; ``None`` if there are none."""
    if isinstance(format, IntFormat) and format.symmetric:
        return tuple(code - format.middle for code in range(2**format.bits))
    if isinstance(format, FloatFormat):
        codes = torch.arange(2.0 * format.elements.middle + 1)
        return tuple(int(n) for n in (format.elements.value(codes) / unit_of(format.elements)).tolist())
    if isinstance(format, TableFormat):
        return tuple(int(value) for value in format.elements.values)
    if isinstance(format, KQuant) and not format.has_minimum:
        return tuple(code - format.middle for code in range(format.levels + 1))
    return None


@dataclass(frozen=True)
class Codes:
    """The inputs of a weight's DequantizeLinear.

    Attributes:
        kind: ONNX element type of codes and zero points: ``INT4``, ``UINT4``, ``INT8``, ``UINT8``, ``FLOAT8E4M3FN``.
        codes: ``(in, out)`` uint8: unsigned codes, two's complement, or the bits of E4M3.
        scale: ``(blocks, out)`` float32; one block: a scale for each output.
        zero: ``(blocks, out)`` uint8; ``None``: 0.
        block: inputs that share a scale; the last block may be smaller.
    """

    kind: str
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    block: int

    @classmethod
    def of(cls, q: QTensor) -> Codes:
        """A quantized weight.

        >>> from lowbit.quant.floating import MXFP4
        >>> from lowbit.quant.format import QParams
        >>> q = QTensor(torch.tensor([[0, 3, 1]], dtype=torch.uint8), QParams(*torch.tensor([[[0.5]], [[2.0]]])),
        ...     IntFormat(2))
        >>> stored = Codes.of(q)
        >>> stored.kind, stored.codes.T.tolist(), stored.zero
        ('INT4', [[254, 1, 255]], None)
        >>> w = torch.tensor([[7.0, -3.1, 1.0, 0.3] * 8])
        >>> stored = Codes.of(MXFP4.quantize(w, MXFP4.qparams(w)))  # elements 4, -1.5, 0.5, 0 and the scale 2
        >>> stored.kind, stored.codes.view(torch.int8).T[0, :4].tolist(), stored.scale.tolist()
        ('INT8', [8, -3, 1, 0], [[1.0]])
        """
        kind, format = kind_of(q.format), q.format
        assert kind is not None, f"{format.name} is refused before"
        scale = q.qparams.scale.float().T.contiguous()
        block = format.group or q.codes.shape[1]
        if kind == FP8:
            assert isinstance(format, FloatFormat)
            return cls(kind, format.elements.to_bits(q.codes).T.contiguous(), scale, None, block)
        if isinstance(format, IntFormat) and not format.symmetric:
            return cls(kind, q.codes.T.contiguous(), scale, q.qparams.zero.to(torch.uint8).T.contiguous(), block)
        steps = _steps(format)
        assert steps is not None
        signed = torch.tensor(steps, dtype=torch.int16)[q.codes.long()]
        if isinstance(format, FloatFormat):
            scale = scale * unit_of(format.elements)
        wide = not SHORT[0] <= min(steps) <= max(steps) <= SHORT[1]
        zero = torch.zeros_like(scale, dtype=torch.uint8) if wide else None
        return cls(kind, (signed & 0xFF).to(torch.uint8).T.contiguous(), scale, zero, block)
