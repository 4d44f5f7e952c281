"""How a quantized weight is stored in a run folder: the tensors under its module's name.

Layouts are those of ``compressed-tensors``, which stock ``transformers`` and vLLM read, and one of our own for
formats that those lack. A module's layout follows from its formats:

======================== ===========================================================================================
``pack-quantized``       integers, dense: ``weight_packed`` int32 ``(out, ceil(in * bits / 32))``, ``weight_shape``
``int-quantized``        integers, one a byte: ``weight`` int8 ``(out, in)``: embeddings and heads, and asymmetric
                         weights behind quantized inputs, whose packed zero points stock loaders misread
``nvfp4-pack-quantized`` two codes a byte, ``weight_scale`` E4M3, ``weight_global_scale`` float32 ``(1,)``, a divisor
``mxfp4-pack-quantized`` two codes a byte, ``weight_scale`` E8M0 bytes
``mxfp6-pack-quantized`` four codes in three bytes, ``weight_scale`` E8M0 bytes
``mxfp8-quantized``      ``weight`` E4M3, ``weight_scale`` E8M0 bytes
``float-quantized``      ``weight`` E4M3, ``weight_scale`` ``(out, groups)``, ``(tiles, tiles)`` or ``(1,)``
``lowbit-packed``        K-quants and tables: dense codes, scales on both of their levels
======================== ===========================================================================================

Integers have ``weight_scale`` ``(out, groups)`` and, if asymmetric, ``weight_zero_point``; stored integers are
``code - 2**(bits - 1)``. Packed asymmetric weights load in stock ``transformers`` only if dequantized at load time,
which multiplies in the dtype of the scale: it is stored as float32 with the same 16-bit value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.activations import ActFormat
from lowbit.quant.elements import E4M3
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format, QParams, QTensor, split_groups
from lowbit.quant.integer import IntFormat, integer
from lowbit.quant.kquants import SUPERBLOCK, KQuant
from lowbit.quant.scales import Plain, PowerOfTwo, TwoLevel, shared_exponent, split_scales
from lowbit.quant.tables import TableFormat


@dataclass(frozen=True)
class Stored:
    """How one tensor of a quantized weight is stored."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Layout(ABC):
    """The tensors of a quantized weight, by name relative to its module."""

    name: str

    @abstractmethod
    def tensors(self, format: Format) -> tuple[str, ...]:
        """The names of the tensors, that of the codes first."""

    @abstractmethod
    def stored(self, format: Format, rows: int, columns: int) -> dict[str, Stored]:
        """Dtypes and shapes of the tensors of a weight ``(rows, columns)``, in the order of ``tensors``."""

    def bits_per_value(self, format: Format, columns: int) -> float:
        """Bits of a value on disk: the format's, unless codes or scales take more."""
        return format.bits_per_value(columns)

    @abstractmethod
    def pack(self, q: QTensor, exponent: int | None = None) -> dict[str, Tensor]:
        """A weight as its tensors.

        Args:
            q: the weight.
            exponent: of the power of two that several fused modules share as their tensors' scale; by default the
                weight's own.
        """

    def unpack(self, stored: Mapping[str, Tensor], format: Format) -> QTensor:
        """The inverse of ``pack``; the qparams are in float32.

        Raises:
            ValueError: a tensor has another dtype or shape than ``pack`` gives it; they may come from a broken file.
        """
        names = self.tensors(format)
        if "weight_shape" in names:
            shape = stored["weight_shape"].flatten()[:3].tolist()
        else:
            shape = list(stored[names[0]].shape)
            if len(shape) == 2 and names[0] == "weight_packed":
                shape[1] = shape[1] * 8 // format.elements.bits
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"the weight's shape is {shape}; two sizes of 1 or more are allowed")
        for name, expected in self.stored(format, int(shape[0]), int(shape[1])).items():
            found = Stored(stored[name].dtype, tuple(stored[name].shape))
            if found != expected:
                raise ValueError(
                    f"{name} is {found.dtype} {found.shape}; for a weight of {shape} only {expected.dtype} "
                    f"{expected.shape} is allowed"
                )
        return self._unpack(stored, format)

    @abstractmethod
    def _unpack(self, stored: Mapping[str, Tensor], format: Format) -> QTensor:
        """``unpack`` of tensors with the right dtypes and shapes."""


class PackedIntegers(Layout):
    """``pack-quantized``."""

    name = "pack-quantized"

    def bits_per_value(self, format: Format, columns: int) -> float:
        """The format's; scales beside zero points take 32 bits.

        >>> PACKED.bits_per_value(IntFormat(4, 32, symmetric=False), 64)
        5.125
        """
        format = integer(format, self.name)
        wider = 0 if format.symmetric else 32 - format.scales.bits
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
            "weight_packed": Stored(torch.int32, (rows, _words(columns, format.bits))),
            "weight_shape": Stored(torch.int64, (2,)),
            "weight_scale": Stored(format.scale_dtype if format.symmetric else torch.float32, (rows, groups)),
        }
        if not format.symmetric:
            out["weight_zero_point"] = Stored(torch.int32, (_words(rows, format.bits), groups))
        return out

    def pack(self, q: QTensor, exponent: int | None = None) -> dict[str, Tensor]:
        """Codes as a dense bit stream."""
        format = integer(q.format, self.name)
        out = {
            "weight_packed": pack_to_int32(_signed(q, format), format.bits),
            "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
        }
        if format.symmetric:
            return {**out, "weight_scale": q.qparams.scale.to(format.scale_dtype)}
        zero = pack_to_int32(_signed_zero(q, format), format.bits, packed_dim=0)
        return {**out, "weight_scale": q.qparams.scale.to(torch.float32), "weight_zero_point": zero}

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


# Imported late, because the package loads parts of transformers that plans and messages do without.


def pack_to_int32(codes: Tensor, bits: int, packed_dim: Literal[0, 1] = 1) -> Tensor:
    """compressed-tensors' dense bit stream."""
    from compressed_tensors.compressors.pack_quantized import helpers

    return helpers.pack_to_int32(codes, bits, packed_dim=packed_dim)


def unpack_from_int32(packed: Tensor, bits: int, shape: torch.Size, packed_dim: Literal[0, 1] = 1) -> Tensor:
    """The inverse of ``pack_to_int32``."""
    from compressed_tensors.compressors.pack_quantized import helpers

    return helpers.unpack_from_int32(packed.contiguous(), bits, shape, packed_dim=packed_dim)


def _words(values: int, bits: int) -> int:
    """Words of 32 bits that hold so many values."""
    return -(-values * bits // 32)


def _signed(q: QTensor, format: IntFormat) -> Tensor:
    return (q.codes.to(torch.int16) - format.middle).to(torch.int8)


def _signed_zero(q: QTensor, format: IntFormat) -> Tensor:
    return (q.qparams.zero.to(torch.int16) - format.middle).to(torch.int8)


def _unsigned(signed: Tensor, scale: Tensor, zero: Tensor | None, format: IntFormat) -> QTensor:
    codes = (signed.to(torch.int16) + format.middle).to(torch.uint8)
    middle = torch.full_like(scale, format.middle)
    return QTensor(codes, QParams(scale, middle if zero is None else zero.to(torch.float32) + middle), format)


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
        bits = _unpack_bits(stored[self.tensors(format)[0]], format.elements.bits)
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


def _unpack_bits(packed: Tensor, width: int) -> Tensor:
    """The inverse of ``_pack_bits``."""
    if width == 8:
        return packed.view(torch.uint8)
    if width == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    three = packed.to(torch.int32).unflatten(-1, (-1, 3))
    word = sum(three[..., i] << 8 * i for i in range(3))
    return torch.stack([(word >> 6 * i) & 63 for i in range(4)], -1).flatten(-2).to(torch.uint8)


class Own(Layout):
    """``lowbit-packed``: formats of llama.cpp, for which ``compressed-tensors`` has no layout.

    Dense codes, and each level of the scales as a tensor of its own: ``weight_scale`` (uint8 integers, or float16 of
    a table's format) and ``weight_super_scale`` (float16); minima likewise.
    """

    name = "lowbit-packed"

    def bits_per_value(self, format: Format, columns: int) -> float:
        """The format's; the integers of a K-quant's scales and minima take a byte each.

        >>> from lowbit.quant.kquants import k_quant
        >>> OWN.bits_per_value(k_quant("q4_k"), 256)
        4.625
        """
        if not isinstance(format, KQuant):
            return format.bits_per_value(columns)
        integers = (2 if format.has_minimum else 1) * format.groups(columns)
        return format.bits_per_value(columns) + (8 - format.scales.bits) * integers / columns

    def tensors(self, format: Format) -> tuple[str, ...]:
        """Codes, their shape, scales and minima."""
        names = ["weight_packed", "weight_shape", "weight_scale"]
        if isinstance(format, KQuant):
            names += ["weight_super_scale"]
            names += ["weight_minimum", "weight_super_minimum"] if format.has_minimum else []
        return tuple(names)

    def stored(self, format: Format, rows: int, columns: int) -> dict[str, Stored]:
        """See ``Layout``."""
        groups = format.groups(columns)
        out = {
            "weight_packed": Stored(torch.int32, (rows, _words(columns, format.elements.bits))),
            "weight_shape": Stored(torch.int64, (2,)),
        }
        if isinstance(format, TableFormat):
            return {**out, "weight_scale": Stored(format.scale_dtype, (rows, groups))}
        integers, factors = Stored(torch.uint8, (rows, groups)), Stored(torch.float16, (rows, columns // SUPERBLOCK))
        out |= {"weight_scale": integers, "weight_super_scale": factors}
        if _k(format).has_minimum:
            out |= {"weight_minimum": integers, "weight_super_minimum": factors}
        return out

    def pack(self, q: QTensor, exponent: int | None = None) -> dict[str, Tensor]:
        """See ``Layout``."""
        bits = q.format.elements.bits
        signed = (q.codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        out = {
            "weight_packed": pack_to_int32(signed, bits),
            "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
        }
        if isinstance(q.format, TableFormat):
            return {**out, "weight_scale": q.qparams.scale.to(q.format.scale_dtype)}
        out["weight_scale"], out["weight_super_scale"] = levels_of(q.qparams.scale, _k(q.format))
        if _k(q.format).has_minimum:
            out["weight_minimum"], out["weight_super_minimum"] = levels_of(q.qparams.zero, _k(q.format))
        return out

    def _unpack(self, stored: Mapping[str, Tensor], format: Format) -> QTensor:
        """See ``Layout``."""
        bits, shape = format.elements.bits, torch.Size(stored["weight_shape"].tolist())
        codes = unpack_from_int32(stored["weight_packed"], bits, shape).to(torch.int16) + 2 ** (bits - 1)
        if isinstance(format, TableFormat):
            scale = stored["weight_scale"].to(torch.float32)
            return QTensor(codes.to(torch.uint8), QParams(scale, torch.zeros_like(scale)), format)
        format = _k(format)
        scale = _product(stored["weight_scale"], stored["weight_super_scale"])
        zero = torch.full_like(scale, format.middle)
        if format.has_minimum:
            zero = _product(stored["weight_minimum"], stored["weight_super_minimum"])
        return QTensor(codes.to(torch.uint8), QParams(scale, zero), format)


def levels_of(products: Tensor, format: KQuant) -> tuple[Tensor, Tensor]:
    """A K-quant's scales ``(rows, groups)`` as integers uint8 and float16 factors ``(rows, superblocks)``."""
    blocks = split_groups(products, products.shape[-1] * format.group // SUPERBLOCK)
    factor, integers, found = split_scales(blocks, format.scales.largest)
    assert bool(found.all()), "scales that are no products of integers and a float16"
    return integers.flatten(-2).to(torch.uint8), factor[..., 0].to(torch.float16)


def _product(integers: Tensor, factor: Tensor) -> Tensor:
    groups = integers.shape[-1] // factor.shape[-1]
    return integers.to(torch.float32) * factor.to(torch.float32).repeat_interleave(groups, -1)


def _k(format: Format) -> KQuant:
    if not isinstance(format, KQuant):
        raise LowbitError(f"no layout of a run folder holds {format.name}")
    return format


PACKED, PLAIN, OWN = PackedIntegers(), PlainIntegers(), Own()
NVFP4, MXFP4, MXFP6 = (Floats(f"{name}-pack-quantized") for name in ("nvfp4", "mxfp4", "mxfp6"))
MXFP8, FP8 = Floats("mxfp8-quantized"), Floats("float-quantized")
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (PACKED, PLAIN, NVFP4, MXFP4, MXFP6, MXFP8, FP8, OWN)}


def layout_of(format: Format, inputs: ActFormat | None = None, *, outside: bool = False) -> Layout:
    """The layout of a module's weight.

    Args:
        format: the weight's.
        inputs: the input's as the checkpoint states it; ``None``: float.
        outside: the module is an embedding or the head.
    """
    if isinstance(format, FloatFormat):
        if isinstance(format.scales, Plain):
            return FP8
        return {"nvfp4": NVFP4, "mxfp4": MXFP4, "mxfp6": MXFP6, "mxfp8": MXFP8}[format.label]
    if isinstance(format, KQuant | TableFormat):
        return OWN
    integers = integer(format, "a layout of a run folder")
    return PLAIN if outside or (inputs is not None and not integers.symmetric) else PACKED
