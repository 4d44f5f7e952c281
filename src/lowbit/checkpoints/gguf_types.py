"""Types of GGUF tensors, those included that the ``gguf`` package does not have, and a reader that knows them.

===== ====== ======= ============================================================================================
type  values bytes   content
===== ====== ======= ============================================================================================
Q2_0  64     18      scale float16; four codes a byte, the first in the lowest bits: ``value = (code - 1) * scale``
===== ====== ======= ============================================================================================

llama.cpp numbers it 42. A fork of llama.cpp gives the same number to blocks of 128 values, which are 34 bytes; such a
file is no multiple of these blocks.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q2_0)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize

Bytes = npt.NDArray[Any]  # of uint8; numpy's annotations call it signed once it is shifted by a number


class OwnKind(IntEnum):
    """Types that the package lacks, by llama.cpp's number."""

    Q2_0 = 42


SIZES: dict[int, tuple[int, int]] = {**GGML_QUANT_SIZES, OwnKind.Q2_0: (64, 18)}
AnyKind: TypeAlias = "GGMLQuantizationType | OwnKind"


def bytes_of(shape: Sequence[int], kind: AnyKind) -> int:
    """Bytes of a tensor whose rows consist of whole blocks.

    >>> bytes_of((3, 128), OwnKind.Q2_0)
    108
    """
    values, size = SIZES[kind]
    return math.prod(shape) // values * size


def pack_q2_0(codes: Bytes, scale: Bytes) -> Bytes:
    """Blocks ``uint8 (rows, blocks, 18)``.

    Args:
        codes: ``uint8 (rows, blocks, 64)``, 0 to 3.
        scale: the bytes of a float16 for each block, ``uint8 (rows, blocks, 2)``.

    >>> scale = np.array([[-0.25]], dtype="<f2")[..., None].view(np.uint8)
    >>> pack_q2_0(np.array([[[3, 2, 1, 0] * 16]], dtype=np.uint8), scale)[0, 0, :3].tolist()
    [0, 180, 27]
    """
    four = codes.reshape(*codes.shape[:2], 16, 4) << np.arange(0, 8, 2, dtype=np.uint8)
    return np.concatenate([scale, np.bitwise_or.reduce(four, axis=-1)], axis=-1)


def values_of(data: Bytes, kind: AnyKind) -> npt.NDArray[np.float32]:
    """The float32 values of rows of blocks, in an array of their own."""
    if kind is not OwnKind.Q2_0:
        return np.array(dequantize(data, kind), dtype=np.float32)
    values, size = SIZES[kind]
    blocks = data.reshape(*data.shape[:-1], -1, size)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    codes = blocks[..., 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    steps = codes.reshape(*codes.shape[:-2], values).astype(np.float32) - 1
    return (steps * scale).reshape(*data.shape[:-1], -1)


def known_type(number: int) -> AnyKind:
    """The type with llama.cpp's number; raises ``ValueError`` for one that is not known here."""
    if number in list(OwnKind):
        return OwnKind(number)
    kind = GGMLQuantizationType(number)
    if kind not in SIZES:
        raise ValueError(f"{kind.name} has no blocks of a known size")
    return kind


class Reader(gguf.GGUFReader):  # type: ignore[misc]  # the package has no annotations
    """The package's reader, and tensors of ``OwnKind``; those first that the package knows."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        own = [field for field in fields if field.parts[4][0] in list(OwnKind)]
        super()._build_tensors(start_offs, [field for field in fields if field.parts[4][0] not in list(OwnKind)])
        self.tensors += [self._own(start_offs, field) for field in own]

    def _own(self, start: int, field: Any) -> ReaderTensor:
        """A tensor of a type that the package lacks; its data are rows of bytes."""
        _, name, _, dims, number, offset = field.parts
        kind, shape = OwnKind(int(number[0])), tuple(int(n) for n in reversed(dims))
        size, place = bytes_of(shape, kind), int(start + offset[0])
        data = self._get(place, np.uint8, size).reshape(*shape[:-1], -1)
        return ReaderTensor(bytes(name).decode(), kind, dims, math.prod(shape), size, place, data, field)
