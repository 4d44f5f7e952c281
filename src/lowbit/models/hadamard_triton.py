"""One Triton kernel for signs, Hadamard transform and quantization per token, see ``hadamard_quantize.py``.

One program takes one token of ``b`` blocks of ``n = 2^k m`` channels as a matrix of ``b 2^k`` rows and ``m`` columns.
The butterflies of the fast Walsh-Hadamard transform run over the rows, ``k`` of them, and for an odd ``m`` above 1
the columns are multiplied by ``C_m``. Then the token's range, its scale and its codes, which are multiplied out at
once, as ``lowbit.load`` computes with values.

Source: the transform is Fino and Algazi, IEEE Transactions on Computers, 1976, in the order of Sylvester's matrix.

Needs Triton: pip install triton. Runs on a GPU, or anywhere with ``TRITON_INTERPRET=1`` set before the import.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.models.fixed_hadamard import FixedHadamard
from lowbit.models.hadamard import Hadamard, hartley
from lowbit.quant.activations import IntTokens

LEAST = 16  # rows and columns of a matrix product on a GPU


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]
    x, signs, matrix, low_ratio, high_ratio, out, width, norm,
    LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr,
    STEPS: tl.constexpr, ODD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = rows[:, None] * ODD + columns[None, :]
    inside = (columns[None, :] < ODD) & (at < width)
    value = tl.load(x + token * width + at, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(signs + at, mask=inside, other=0.0)
    for step in tl.static_range(STEPS):
        pairs = tl.reshape(value, (ROWS // (2 * 2**step), 2, 2**step * COLUMNS))
        first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
        pairs = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
        value = tl.reshape(pairs, (ROWS, COLUMNS))
    if ODD > 1:
        place = columns[:, None] * COLUMNS + columns[None, :]
        value = tl.dot(value, tl.load(matrix + place), input_precision="ieee")
    # Values of 16 bits are rounded where the plain form rounds them.
    value = (value * norm).to(out.dtype.element_ty).to(tl.float32)
    value = tl.where(inside, value, 0.0)
    bottom = tl.minimum(tl.min(tl.min(value, 1), 0), 0.0) * tl.load(low_ratio)
    top = tl.maximum(tl.max(tl.max(value, 1), 0), 0.0) * tl.load(high_ratio)
    magic = 12582912.0  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer, ties to even
    if SYMMETRIC:
        scale = tl.maximum(-bottom, top) / ((HIGH - LOW) / 2)
        scale = tl.where(scale == 0.0, 1.1920929e-07, scale)
        zero = scale * 0.0
    else:
        scale = (top - bottom) / (HIGH - LOW)
        scale = tl.where(scale == 0.0, 1.1920929e-07, scale)
        zero = tl.minimum(tl.maximum(LOW - bottom / scale, LOW), HIGH)
        zero = (zero + magic) - magic
    code = tl.minimum(tl.maximum(value / scale + zero, LOW), HIGH)
    code = (code + magic) - magic
    tl.store(out + token * width + at, ((code - zero) * scale).to(out.dtype.element_ty), mask=inside)


def hadamard_quantize(mix: Hadamard | FixedHadamard, format: IntTokens, ratios: Tensor | None, x: Tensor) -> Tensor:
    """``HadamardQuantize(mix, format, ratios)(x)`` by the kernel, for ``x`` ``(..., width)`` in its dtype.

    Raises:
        LowbitError: the width of ``x`` is not that of the transform.
    """
    if x.shape[-1] != mix.width:
        raise LowbitError(
            f"hadamard_quantize: x {tuple(x.shape)} given; the transform takes (..., {mix.width}): "
            "pass the linear's input"
        )
    size = mix.flips.shape[1] if isinstance(mix, Hadamard) else mix.size
    steps = (size & -size).bit_length() - 1
    odd = size >> steps
    columns = 1 if odd == 1 else max(LEAST, triton.next_power_of_2(odd))
    rows = triton.next_power_of_2(mix.width // odd)
    rows = rows if odd == 1 else max(LEAST, rows)
    signs = torch.ones(mix.width, device=x.device)
    if isinstance(mix, Hadamard):
        signs = 1 - 2 * mix.flips.flatten().to(x.device, torch.float32)
    matrix = torch.zeros(columns, columns, device=x.device)
    matrix[:odd, :odd] = hartley(odd).to(x.device, torch.float32)
    ends = torch.ones(2) if ratios is None else ratios.float()
    low, high = ends.to(x.device).unbind()
    rows_of_x = x.contiguous().reshape(-1, mix.width)
    out = torch.empty_like(rows_of_x)
    low_code, high_code = format.codes
    if len(rows_of_x):
        _kernel[(len(rows_of_x),)](
            rows_of_x, signs, matrix, low, high.contiguous(), out, mix.width, 2.0 ** (-steps / 2),
            LOW=low_code, HIGH=high_code, SYMMETRIC=format.symmetric,
            STEPS=steps, ODD=odd, ROWS=rows, COLUMNS=columns,
        )  # fmt: skip
    return out.reshape(x.shape)
