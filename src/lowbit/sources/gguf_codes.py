"""Codes and scales of a ``.gguf`` file's tensors, as ``gguf_types.values_of`` decodes them.

A block is decoded with some of its bytes replaced: with all scales 1 its values are its codes, with all codes 1 they
are its scales, with all codes 0 its minima. So the decoder of values says where each bit belongs, for every type
alike, and ``decoded`` compares the result with what it makes of the file's own bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lowbit.checkpoints.gguf_check import row_order
from lowbit.checkpoints.gguf_file import GgufFile
from lowbit.checkpoints.gguf_types import SIZES, AnyKind, OwnKind, values_of
from lowbit.quant.floating import MXFP4, NVFP4
from lowbit.quant.format import Format, QParams, QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import KQuant, k_quant
from lowbit.quant.tables import IQ4_NL, Q2_0, TableFormat
from lowbit.sources.layout import Decoded, FloatOnly

Bytes = npt.NDArray[np.uint8]
Patch = tuple[tuple[int, bytes], ...]  # bytes of a block from an offset on
FLOATS = (Kind.F32, Kind.F16, Kind.BF16, Kind.F64)
ONE = np.float16(1.0).tobytes()
SIX_BITS = bytes([1] * 4 + [0] * 4 + [1] * 4)  # of Q4_K and Q5_K: scales of 1, minima of 0
ZERO = b"\x00\x00"


@dataclass(frozen=True)
class Block:
    """A type of ``.gguf`` files that is a format of ours.

    Attributes:
        format: the format.
        scale_one: makes every scale 1 and every minimum 0.
        code_one: makes every value, before its scale, 1.
        no_minimum: makes every minimum 0.
        code_zero: makes every code 0; only for types with minima.
    """

    format: Format
    scale_one: Patch
    code_one: Patch
    no_minimum: Patch = ()
    code_zero: Patch = ()


BLOCKS: Mapping[AnyKind, Block] = {
    Kind.Q4_0: Block(IntFormat(4, 32), ((0, ONE),), ((2, b"\x99" * 16),)),
    Kind.Q5_0: Block(IntFormat(5, 32), ((0, ONE),), ((2, b"\xff" * 4 + b"\x11" * 16),)),
    Kind.Q8_0: Block(IntFormat(8, 32), ((0, ONE),), ((2, b"\x01" * 32),)),
    Kind.Q2_K: Block(
        k_quant("q2_k"),
        ((0, b"\x01" * 16), (80, ONE + ZERO)),
        ((16, b"\x55" * 64),),
        ((82, ZERO),),
        ((16, b"\x00" * 64),),
    ),
    Kind.Q3_K: Block(k_quant("q3_k"), ((96, b"\x11" * 8 + b"\xaa" * 4 + ONE),), ((0, b"\xff" * 32 + b"\x55" * 64),)),
    Kind.Q4_K: Block(
        k_quant("q4_k"),
        ((0, ONE + ZERO + SIX_BITS),),
        ((16, b"\x11" * 128),),
        ((2, ZERO),),
        ((16, b"\x00" * 128),),
    ),
    Kind.Q5_K: Block(
        k_quant("q5_k"),
        ((0, ONE + ZERO + SIX_BITS),),
        ((16, b"\x00" * 32 + b"\x11" * 128),),
        ((2, ZERO),),
        ((16, b"\x00" * 160),),
    ),
    Kind.Q6_K: Block(k_quant("q6_k"), ((192, b"\x01" * 16 + ONE),), ((0, b"\x11" * 128 + b"\xaa" * 64),)),
    Kind.IQ4_NL: Block(IQ4_NL, ((0, ONE),), ((2, b"\x88" * 16),)),
    OwnKind.Q2_0: Block(Q2_0, ((0, ONE),), ((2, b"\xaa" * 16),)),
    Kind.MXFP4: Block(MXFP4, ((0, b"\x7f"),), ((1, b"\x22" * 16),)),
    Kind.NVFP4: Block(NVFP4, ((0, b"\x38" * 4),), ((4, b"\x22" * 32),)),
}


def types_text(file: GgufFile) -> str:
    """The types of a file's quantized tensors, the most common first: ``Q4_K 12, Q6_K 3``."""
    kinds = Counter(tensor.tensor_type.name for tensor in file.tensors if tensor.tensor_type not in FLOATS)
    return ", ".join(f"{name} {count}" for name, count in kinds.most_common())


def quantized(file: GgufFile) -> dict[str, str]:
    """Names of the file's quantized tensors by the model's names."""
    return {file.names[t.name]: t.name for t in file.tensors if t.tensor_type not in FLOATS}


def decoded(file: GgufFile, name: str) -> Decoded:
    """A quantized weight by its name in the file, with rows in the model's order."""
    tensor = next(tensor for tensor in file.tensors if tensor.name == name)
    kind, scale = tensor.tensor_type, file.scales.get(name)
    exact = torch.from_numpy(values_of(tensor.data, kind))
    exact = exact if scale is None else exact * torch.tensor(scale)
    rows = row_order(file.architecture, name, len(exact), file.model.config)
    order = torch.arange(len(exact)) if rows is None else torch.from_numpy(rows)
    if kind not in BLOCKS:
        return FloatOnly(exact[order], f"no format is llama.cpp's {kind.name}")
    if scale is not None and np.frexp(scale)[0] != 0.5:
        return FloatOnly(exact[order], "its tensor's scale is no power of two")
    q = unpack(tensor.data, kind)
    if scale is not None:
        q = QTensor(q.codes, QParams(q.qparams.scale * torch.tensor(scale), q.qparams.zero), q.format)
    if not torch.equal(q.dequantize(), exact):
        return FloatOnly(exact[order], f"its blocks hold more than {q.format.name} does")
    return q.select_rows(order)


def unpack(data: Bytes, kind: AnyKind) -> QTensor:
    """Codes and scales of blocks ``(rows, bytes)`` of a type in ``BLOCKS``.

    >>> block = np.frombuffer(np.float16(0.5).tobytes() + bytes([0x9A] * 16), np.uint8)[None]
    >>> q = unpack(block, Kind.Q4_0)
    >>> q.codes[0, [0, 16]].tolist(), q.qparams.scale.tolist(), q.dequantize()[0, [0, 16]].tolist()
    ([10, 9], [[0.5]], [1.0, 0.5])
    """
    block = BLOCKS[kind]
    format, size = block.format, block.format.group or 1
    scale = _values(data, kind, block.code_one + block.no_minimum)[:, ::size]
    ones = torch.ones_like(scale)
    if isinstance(format, KQuant) and format.has_minimum:
        zero, neutral = -_values(data, kind, block.code_zero)[:, ::size], torch.zeros_like(scale)
    elif isinstance(format, TableFormat):
        zero = neutral = torch.zeros_like(scale)
    else:
        zero = neutral = torch.full_like(scale, float(getattr(format, "middle", 0)))
    codes = format.quantize(_values(data, kind, block.scale_one), QParams(ones, neutral)).codes
    return QTensor(codes, QParams(scale.contiguous(), zero.contiguous()), format)


def _values(data: Bytes, kind: AnyKind, patch: Patch) -> Tensor:
    """What blocks decode to with bytes replaced, float32 ``(rows, columns)``."""
    blocks = np.array(data).reshape(len(data), -1, SIZES[kind][1])
    for start, content in patch:
        blocks[..., start : start + len(content)] = np.frombuffer(content, np.uint8)
    return torch.from_numpy(values_of(blocks.reshape(data.shape), kind))
