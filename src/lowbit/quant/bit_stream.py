"""compressed-tensors' dense bit streams: codes of any width in 32-bit words, the first in the lowest bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Imported late, because the package loads parts of transformers that plans and messages do without.


def pack_to_int32(codes: Tensor, bits: int, packed_dim: Literal[0, 1] = 1) -> Tensor:
    """compressed-tensors' dense bit stream."""
    from compressed_tensors.compressors.pack_quantized import helpers

    return helpers.pack_to_int32(codes, bits, packed_dim=packed_dim)


def unpack_from_int32(packed: Tensor, bits: int, shape: torch.Size, packed_dim: Literal[0, 1] = 1) -> Tensor:
    """The inverse of ``pack_to_int32``."""
    from compressed_tensors.compressors.pack_quantized import helpers

    if packed_dim == 1:
        return helpers.unpack_from_int32(packed.contiguous(), bits, shape)
    # Transposed here: the library's own transposition of a single word a column cannot be read as bytes.
    columns = packed.T.clone(memory_format=torch.contiguous_format)
    return helpers.unpack_from_int32(columns, bits, torch.Size(reversed(shape))).T.contiguous()


def words(values: int, bits: int) -> int:
    """Words of 32 bits that hold so many values."""
    return -(-values * bits // 32)
