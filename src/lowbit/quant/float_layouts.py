"""Floating-point formats in the layouts of ``compressed-tensors``. See ``layouts.py``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.elements import E4M3
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format, QParams, QTensor
from lowbit.quant.layout import Layout, Stored
from lowbit.quant.scales import PowerOfTwo, TwoLevel, shared_exponent


class Floats(Layout):
    """The layouts of floating-point formats."""

    def __init__(self, name: str) -> None:
        self.name = name

    def tensors(self, format: Format) -> tuple[str, ...]:
        """Codes, scales, and the tensor's scale of NVFP4."""
        format = _float(format)
        codes = "weight" if format.elements.bits == 8 else "weight_packed"
        return (codes, "weight_scale", *(("weight_global_scale",) if isinstance(format.scales, TwoLevel) else ()))

    def stored(self, format: Format, rows: int, columns: int) -> dict[str, Stored]:
        """See ``Layout``."""
        format, groups, bits = _float(format), format.groups(columns), format.elements.bits
        codes = Stored(torch.float8_e4m3fn if bits == 8 else torch.uint8, (rows, columns * bits // 8))
        out = {self.tensors(format)[0]: codes}
        if isinstance(format.scales, PowerOfTwo):
            return {**out, "weight_scale": Stored(torch.uint8, (rows, groups))}
        if isinstance(format.scales, TwoLevel):
            out["weight_scale"] = Stored(torch.float8_e4m3fn, (rows, groups))
            return {**out, "weight_global_scale": Stored(torch.float32, (1,))}
        shape = (-(-rows // format.rows), groups) if format.rows else (1,)
        return {**out, "weight_scale": Stored(format.scales.dtype, shape)}

    def pack(self, q: QTensor, exponent: int | None = None) -> dict[str, Tensor]:
        """See ``Layout``; raises ``AssertionError`` for an exponent with which a scale cannot be stored."""
        format, scale = _float(q.format), q.qparams.scale
        bits = format.elements.to_bits(q.codes)
        out = {self.tensors(format)[0]: _pack_bits(bits, format.elements.bits)}
        if isinstance(format.scales, PowerOfTwo):
            return {**out, "weight_scale": format.scales.to_bytes(scale)}
        if isinstance(format.scales, TwoLevel):
            exponent = shared_exponent([scale]) if exponent is None else exponent
            assert exponent is not None, "scales that are no E4M3 numbers over a power of two"
            inner = torch.ldexp(scale, torch.tensor(exponent))
            assert torch.equal(E4M3.nearest(inner), inner), "scales that cannot share this exponent"
            out["weight_scale"] = inner.to(torch.float8_e4m3fn)
            return {**out, "weight_global_scale": torch.tensor([2.0**exponent], dtype=torch.float32)}
        rows = {0: scale[:1, 0], 1: scale}.get(format.rows, scale[:: max(format.rows, 1)])
        return {**out, "weight_scale": rows.to(format.scales.dtype)}

    def _unpack(self, stored: Mapping[str, Tensor], format: Format) -> QTensor:
        """See ``Layout``."""
        format = _float(format)
        bits = unpack_bits(stored[self.tensors(format)[0]], format.elements.bits)
        scale = stored["weight_scale"]
        if isinstance(format.scales, PowerOfTwo):
            scale = format.scales.from_bytes(scale)
        elif isinstance(format.scales, TwoLevel):
            scale = scale.to(torch.float32) / stored["weight_global_scale"]
        elif format.rows == 0:
            scale = scale.to(torch.float32).expand(len(bits), 1)
        else:
            scale = scale.to(torch.float32).repeat_interleave(format.rows, 0)[: len(bits)]
        middle = torch.full_like(scale, format.middle)
        return QTensor(format.elements.from_bits(bits), QParams(scale, middle), format)


def _float(format: Format) -> FloatFormat:
    if not isinstance(format, FloatFormat):
        raise LowbitError(f"a floating-point layout does not hold {format.name}")
    return format


def _pack_bits(bits: Tensor, width: int) -> Tensor:
    """Codes of 4, 6 or 8 bits, the first in the lowest bits; 8 bits as E4M3.

    >>> _pack_bits(torch.tensor([[6, 12]], dtype=torch.uint8), 4).tolist()
    [[198]]
    >>> _pack_bits(torch.tensor([[31, 41, 4, 53]], dtype=torch.uint8), 6).tolist()
    [[95, 74, 212]]
    """
    if width == 8:
        return bits.view(torch.float8_e4m3fn)
    if width == 4:
        return bits[:, 0::2] | bits[:, 1::2] << 4
    four = bits.to(torch.int32).unflatten(-1, (-1, 4))
    word = sum(four[..., i] << 6 * i for i in range(4))
    return torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], -1).flatten(-2).to(torch.uint8)


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """The inverse of ``_pack_bits``."""
    if width == 8:
        return packed.view(torch.uint8)
    if width == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    three = packed.to(torch.int32).unflatten(-1, (-1, 3))
    word = sum(three[..., i] << 8 * i for i in range(3))
    return torch.stack([(word >> 6 * i) & 63 for i in range(4)], -1).flatten(-2).to(torch.uint8)
