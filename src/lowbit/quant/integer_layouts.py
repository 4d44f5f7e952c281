"""Integers in the layouts of ``compressed-tensors``: dense, and one a byte. See ``layouts.py``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.quant.bit_stream import pack_to_int32, unpack_from_int32, words
from lowbit.quant.format import Format, QParams, QTensor
from lowbit.quant.integer import IntFormat, integer
from lowbit.quant.layout import Layout, Stored


class PackedIntegers(Layout):
    """``pack-quantized``.

    Attributes:
        wide: scales are stored in 32 bits, for loaders that multiply in the dtype of the scale: those of asymmetric
            weights always, those of experts on request.
    """

    name = "pack-quantized"

    def __init__(self, wide: bool = False) -> None:
        self.wide = wide

    def bits_per_value(self, format: Format, columns: int) -> float:
        """The format's; scales beside zero points take 32 bits.

        >>> PackedIntegers().bits_per_value(IntFormat(4, 32, symmetric=False), 64)
        5.125
        """
        format = integer(format, self.name)
        wider = 8 * self._scale_dtype(format).itemsize - format.scales.bits
        return format.bits_per_value(columns) + wider * format.groups(columns) / columns

    def tensors(self, format: Format) -> tuple[str, ...]:
        """Codes, their shape, scales, and zero points if there are any."""
        zero = () if integer(format, self.name).symmetric else ("weight_zero_point",)
        return ("weight_packed", "weight_shape", "weight_scale", *zero)

    def stored(self, format: Format, rows: int, columns: int) -> dict[str, Stored]:
        """See ``Layout``.

        >>> PackedIntegers().stored(IntFormat(4, group=16), 8, 64)["weight_packed"]
        Stored(dtype=torch.int32, shape=(8, 8))
        """
        format, groups = integer(format, self.name), format.groups(columns)
        out = {
            "weight_packed": Stored(torch.int32, (rows, words(columns, format.bits))),
            "weight_shape": Stored(torch.int64, (2,)),
            "weight_scale": Stored(self._scale_dtype(format), (rows, groups)),
        }
        if not format.symmetric:
            out["weight_zero_point"] = Stored(torch.int32, (words(rows, format.bits), groups))
        return out

    def pack(self, q: QTensor, exponent: int | None = None) -> dict[str, Tensor]:
        """Codes as a dense bit stream."""
        format = integer(q.format, self.name)
        out = {
            "weight_packed": pack_to_int32(_signed(q, format), format.bits),
            "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
            "weight_scale": q.qparams.scale.to(self._scale_dtype(format)),
        }
        if format.symmetric:
            return out
        return {**out, "weight_zero_point": pack_to_int32(_signed_zero(q, format), format.bits, packed_dim=0)}

    def _scale_dtype(self, format: IntFormat) -> torch.dtype:
        return torch.float32 if self.wide or not format.symmetric else format.scale_dtype

    def _unpack(self, stored: Mapping[str, Tensor], format: Format) -> QTensor:
        """See ``Layout``."""
        format = integer(format, self.name)
        scale = stored["weight_scale"].to(torch.float32)
        shape = torch.Size(stored["weight_shape"].tolist())
        signed = unpack_from_int32(stored["weight_packed"], format.bits, shape)
        zero = None
        if not format.symmetric:
            zero = unpack_from_int32(stored["weight_zero_point"], format.bits, scale.shape, packed_dim=0)
        return _unsigned(signed, scale, zero, format)


class PlainIntegers(Layout):
    """``int-quantized``."""

    name = "int-quantized"

    def bits_per_value(self, format: Format, columns: int) -> float:
        """A byte for each code."""
        return 8 + format.bits_per_value(columns) - format.elements.bits

    def tensors(self, format: Format) -> tuple[str, ...]:
        """Codes, scales, and zero points if there are any."""
        zero = () if integer(format, self.name).symmetric else ("weight_zero_point",)
        return ("weight", "weight_scale", *zero)

    def stored(self, format: Format, rows: int, columns: int) -> dict[str, Stored]:
        """See ``Layout``."""
        format, groups = integer(format, self.name), format.groups(columns)
        out = {
            "weight": Stored(torch.int8, (rows, columns)),
            "weight_scale": Stored(format.scale_dtype, (rows, groups)),
        }
        return out if format.symmetric else {**out, "weight_zero_point": Stored(torch.int8, (rows, groups))}

    def pack(self, q: QTensor, exponent: int | None = None) -> dict[str, Tensor]:
        """One byte a code."""
        format = integer(q.format, self.name)
        out = {"weight": _signed(q, format), "weight_scale": q.qparams.scale.to(format.scale_dtype)}
        return out if format.symmetric else {**out, "weight_zero_point": _signed_zero(q, format)}

    def _unpack(self, stored: Mapping[str, Tensor], format: Format) -> QTensor:
        """See ``Layout``."""
        format = integer(format, self.name)
        zero = None if format.symmetric else stored["weight_zero_point"]
        return _unsigned(stored["weight"], stored["weight_scale"].to(torch.float32), zero, format)


def _signed(q: QTensor, format: IntFormat) -> Tensor:
    return (q.codes.to(torch.int16) - format.middle).to(torch.int8)


def _signed_zero(q: QTensor, format: IntFormat) -> Tensor:
    return (q.qparams.zero.to(torch.int16) - format.middle).to(torch.int8)


def _unsigned(signed: Tensor, scale: Tensor, zero: Tensor | None, format: IntFormat) -> QTensor:
    codes = (signed.to(torch.int16) + format.middle).to(torch.uint8)
    middle = torch.full_like(scale, format.middle)
    return QTensor(codes, QParams(scale, middle if zero is None else zero.to(torch.float32) + middle), format)
