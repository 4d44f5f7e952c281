"""The Walsh-Hadamard transform: an orthogonal map that gives every channel an equal share of every other.

For a width ``2^k m`` with odd ``m`` the matrix is the Kronecker product of Sylvester's Hadamard matrix of size
``2^k`` and the orthonormal cosine transform (DCT-II) of size ``m``; for a power of two all entries have the size
``1 / sqrt(width)``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def walsh_hadamard(x: Tensor) -> Tensor:
    """``x`` ``(..., width)`` transformed along its last dimension, in its dtype; keeps norms; differentiable.

    >>> walsh_hadamard(torch.tensor([[3.0, 1.0, 0.0, 0.0]])).tolist()
    [[2.0, 1.0, 2.0, 1.0]]
    """
    return x @ _matrix(x.shape[-1]).to(x)


@lru_cache(maxsize=16)
def _matrix(width: int) -> Tensor:
    """The orthogonal matrix ``(width, width)`` in float64: a row vector is multiplied from the left."""
    odd = width // (width & -width)
    out = _cosines(odd)
    for _ in range(int(math.log2(width // odd))):
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)]) / math.sqrt(2)
    return out


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, ``(size, size)`` float64: column ``k`` is the cosine of frequency ``k``."""
    at = torch.arange(size, dtype=torch.float64)
    out = torch.cos(math.pi / size * (at[:, None] + 0.5) * at) * math.sqrt(2 / size)
    out[:, 0] = 1 / math.sqrt(size)
    return out
