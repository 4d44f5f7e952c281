"""``lowbit-packed``: formats of llama.cpp, with each level of their scales as a tensor. See ``layouts.py``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.bit_stream import pack_to_int32, unpack_from_int32, words
from lowbit.quant.format import Format, QParams, QTensor, split_groups
from lowbit.quant.kquants import SUPERBLOCK, KQuant
from lowbit.quant.layout import Layout, Stored
from lowbit.quant.scales import split_scales
from lowbit.quant.tables import TableFormat


class Own(Layout):
    """``lowbit-packed``: formats of llama.cpp, for which ``compressed-tensors`` has no layout.

    Dense codes, and each level of the scales as a tensor of its own: ``weight_scale`` (integers of a byte, or float16
    of a table's format) and ``weight_super_scale`` (float16); minima likewise. Signed integers, which formats without
    minima have, are in two's complement.
    """

    name = "lowbit-packed"

    def bits_per_value(self, format: Format, columns: int) -> float:
        """The format's; the integers of a K-quant's scales and minima take a byte each.

        >>> from lowbit.quant.kquants import k_quant
        >>> Own().bits_per_value(k_quant("q4_k"), 256)
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
            "weight_packed": Stored(torch.int32, (rows, words(columns, format.elements.bits))),
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
        integers = stored["weight_scale"].view(torch.int8) if format.scales.signed else stored["weight_scale"]
        scale = _product(integers, stored["weight_super_scale"])
        zero = torch.full_like(scale, format.middle)
        if format.has_minimum:
            zero = _product(stored["weight_minimum"], stored["weight_super_minimum"])
        return QTensor(codes.to(torch.uint8), QParams(scale, zero), format)


def levels_of(products: Tensor, format: KQuant) -> tuple[Tensor, Tensor]:
    """A K-quant's scales ``(rows, groups)`` as bytes of integers and float16 factors ``(rows, superblocks)``."""
    blocks = split_groups(products, products.shape[-1] * format.group // SUPERBLOCK)
    factor, integers, found = split_scales(blocks, format.scales)
    assert bool(found.all()), "scales that are no products of integers and a float16"
    return integers.flatten(-2).to(torch.int16).to(torch.uint8), factor[..., 0].to(torch.float16)


def _product(integers: Tensor, factor: Tensor) -> Tensor:
    groups = integers.shape[-1] // factor.shape[-1]
    return integers.to(torch.float32) * factor.to(torch.float32).repeat_interleave(groups, -1)


def _k(format: Format) -> KQuant:
    if not isinstance(format, KQuant):
        raise LowbitError(f"no layout of a run folder holds {format.name}")
    return format
