"""Triton kernels that quantize and dequantize a weight in one pass, forward and backward; see ``weight_kernel.py``.

A program takes ``ROWS`` rows of one group, in chunks of ``BLOCK`` columns where a group has more: once for the ends
of the groups' ranges, once for the values. Nothing but the weight, its factors and the ratios is read, and nothing
but the result is written. Backward recomputes all of it from the same inputs, in three readings: one for the ends,
one for the gradients of scale and ends, one that spreads them over the weights. Sums over rows come out as one part
for each program, which are added in order, so that a gradient is the same at every call.

Operations are those of the plain form in its order, and none is contracted: divisions are IEEE 754's, and the launch
asks for no fused products and sums.

Needs Triton: pip install triton. Runs on a GPU, or anywhere with ``TRITON_INTERPRET=1`` set before the import.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE, MOST_COLUMNS = 4096, 1024  # values of a program at a time; columns of a chunk
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scaled(  # type: ignore[no-untyped-def]
    weight, columns, rows, at, column, row, inside, in_row, HAS_COLUMNS: tl.constexpr, HAS_ROWS: tl.constexpr
):
    """The weight, and the weight times the columns' factors over the rows' factors."""
    plain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    by_column = plain
    if HAS_COLUMNS:
        by_column = plain * tl.load(columns + column, mask=inside, other=0.0)
    scaled = by_column
    if HAS_ROWS:
        scaled = tl.div_rn(by_column, tl.broadcast_to(tl.load(rows + row, mask=in_row, other=1.0), by_column.shape))
    return plain, scaled


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _grid(  # type: ignore[no-untyped-def]
    low, high, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr, SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Scale before and after it is stored, zero point, and that before it is rounded."""
    if SYMMETRIC:
        raw = tl.div_rn(tl.maximum(high, -low), low * 0.0 + LEVELS / 2)
    else:
        raw = tl.div_rn(high - low, low * 0.0 + LEVELS)
    scale = tl.minimum(tl.maximum(raw, SMALLEST), LARGEST)
    if HALF:
        scale = scale.to(tl.float16).to(tl.float32)
    if SYMMETRIC:
        place = scale * 0.0 + (LEVELS + 1) // 2
        zero = place
    else:
        place = (tl.div_rn(-low, scale) + MAGIC) - MAGIC
        zero = tl.minimum(tl.maximum(place, 0.0), LEVELS)
    return raw, scale, place, zero


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def forward_kernel(  # type: ignore[no-untyped-def]
    weight, columns, rows, lows, highs, out, height, width, groups, SIZE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_ROWS: tl.constexpr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr,
    HALF: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out`` of ``ROWS`` rows in one group."""
    group = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    in_row = row < height
    bottom, top = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)[None, :]
        column = group * SIZE + place
        inside = in_row & (place < SIZE)
        _plain, value = _scaled(
            weight, columns, rows, row * width + column, column, row, inside, in_row, HAS_COLUMNS, HAS_ROWS
        )
        bottom = tl.minimum(bottom, tl.min(value, 1))
        top = tl.maximum(top, tl.max(value, 1))
    per_group = row * groups + group
    low = bottom[:, None] * tl.load(lows + per_group, mask=in_row, other=1.0)
    high = top[:, None] * tl.load(highs + per_group, mask=in_row, other=1.0)
    _raw, scale, _place, zero = _grid(low, high, LEVELS, SYMMETRIC, HALF, SMALLEST, LARGEST)
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)[None, :]
        column = group * SIZE + place
        inside = in_row & (place < SIZE)
        at = row * width + column
        _plain, value = _scaled(weight, columns, rows, at, column, row, inside, in_row, HAS_COLUMNS, HAS_ROWS)
        code = (tl.div_rn(value, tl.broadcast_to(scale, value.shape)) + MAGIC) - MAGIC
        code = tl.minimum(tl.maximum(code + zero, 0.0), LEVELS)
        tl.store(out + at, ((code - zero) * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def backward_kernel(  # type: ignore[no-untyped-def]
    weight, columns, rows, lows, highs, grad, to_weight, to_columns, to_rows, to_lows, to_highs,
    height, width, groups, SIZE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_ROWS: tl.constexpr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr,
    HALF: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TO_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Gradients of ``ROWS`` rows in one group; ``to_columns`` are sums over them, ``to_rows`` over the group."""
    group = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    in_row = row < height
    bottom, top = tl.full((ROWS,), float("inf"), tl.float32), tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)[None, :]
        column = group * SIZE + place
        inside = in_row & (place < SIZE)
        _plain, value = _scaled(
            weight, columns, rows, row * width + column, column, row, inside, in_row, HAS_COLUMNS, HAS_ROWS
        )
        bottom = tl.minimum(bottom, tl.min(tl.where(inside, value, float("inf")), 1))
        top = tl.maximum(top, tl.max(tl.where(inside, value, float("-inf")), 1))
    per_group = row * groups + group
    least, most = bottom[:, None], top[:, None]
    low_ratio = tl.load(lows + per_group, mask=in_row, other=1.0)
    high_ratio = tl.load(highs + per_group, mask=in_row, other=1.0)
    low, high = tl.minimum(least, 0.0) * low_ratio, tl.maximum(most, 0.0) * high_ratio
    raw, scale, place_of_zero, zero = _grid(low, high, LEVELS, SYMMETRIC, HALF, SMALLEST, LARGEST)

    # Gradients of scale and zero point, and how many values are at each end: they share its gradient.
    d_scale, d_zero = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    at_least, at_most = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)[None, :]
        column = group * SIZE + place
        inside = in_row & (place < SIZE)
        at = row * width + column
        _plain, value = _scaled(weight, columns, rows, at, column, row, inside, in_row, HAS_COLUMNS, HAS_ROWS)
        given = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        position = tl.div_rn(value, tl.broadcast_to(scale, value.shape))
        free = (position + MAGIC) - MAGIC + zero
        code = tl.minimum(tl.maximum(free, 0.0), LEVELS)
        within = (free >= 0.0) & (free <= LEVELS)
        of_code = given * scale
        d_scale += tl.sum(
            given * (code - zero)
            - tl.where(within, of_code * tl.div_rn(position, tl.broadcast_to(scale, value.shape)), 0.0),
            1,
        )
        d_zero += tl.sum(tl.where(within, 0.0, -of_code), 1)
        at_least += tl.sum((inside & (value == least)).to(tl.float32), 1)
        at_most += tl.sum((inside & (value == most)).to(tl.float32), 1)
    of_scale, of_zero = d_scale[:, None], d_zero[:, None]
    of_low = of_scale * 0.0
    if not SYMMETRIC:
        # zero = round(-low / scale), where that is a code
        reached = (place_of_zero >= 0.0) & (place_of_zero <= LEVELS)
        of_quotient = tl.where(reached, of_zero, 0.0)
        of_low = -tl.div_rn(of_quotient, scale)
        of_scale = of_scale - of_quotient * tl.div_rn(tl.div_rn(-low, scale), scale)
    of_raw = tl.where((raw >= SMALLEST) & (raw <= LARGEST), of_scale, 0.0)
    if SYMMETRIC:
        end = tl.div_rn(of_raw, low * 0.0 + LEVELS / 2)
        share = tl.where(high == -low, 0.5, tl.where(high > -low, 1.0, 0.0))
        of_high = end * share
        of_low = of_low - end * (1.0 - share)
    else:
        end = tl.div_rn(of_raw, low * 0.0 + LEVELS)
        of_high = end
        of_low = of_low - end
    tl.store(to_lows + per_group, of_low * tl.minimum(least, 0.0), mask=in_row)
    tl.store(to_highs + per_group, of_high * tl.maximum(most, 0.0), mask=in_row)
    of_least = tl.div_rn(tl.where(least <= 0.0, of_low * low_ratio, 0.0), tl.maximum(at_least, 1.0)[:, None])
    of_most = tl.div_rn(tl.where(most >= 0.0, of_high * high_ratio, 0.0), tl.maximum(at_most, 1.0)[:, None])

    sum_of_row = tl.zeros((ROWS,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)[None, :]
        column = group * SIZE + place
        inside = in_row & (place < SIZE)
        at = row * width + column
        plain, value = _scaled(weight, columns, rows, at, column, row, inside, in_row, HAS_COLUMNS, HAS_ROWS)
        given = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        wide = tl.broadcast_to(scale, value.shape)
        free = (tl.div_rn(value, wide) + MAGIC) - MAGIC + zero
        within = (free >= 0.0) & (free <= LEVELS)
        of_value = tl.where(within, tl.div_rn(given * scale, wide), 0.0)
        of_value += tl.where(value == least, of_least, 0.0) + tl.where(value == most, of_most, 0.0)
        of_value = tl.where(inside, of_value, 0.0)
        if HAS_ROWS:
            factor = tl.broadcast_to(tl.load(rows + row, mask=in_row, other=1.0), value.shape)
            sum_of_row += tl.sum(-of_value * tl.div_rn(value, factor), 1)
            of_value = tl.div_rn(of_value, factor)
        if HAS_COLUMNS:
            tl.store(
                to_columns + tl.program_id(0) * width + column,
                tl.sum(of_value * plain, 0)[None, :],
                mask=place < SIZE,
            )
            of_value = of_value * tl.load(columns + column, mask=inside, other=0.0)
        if TO_WEIGHT:
            tl.store(to_weight + at, of_value, mask=inside)
    if HAS_ROWS:
        tl.store(to_rows + per_group, sum_of_row[:, None], mask=in_row)


def tile(size: int) -> tuple[int, int]:
    """Rows and columns that a program takes at a time, for groups of ``size``; powers of two.

    >>> tile(64), tile(4096), tile(48)
    ((64, 64), (4, 1024), (64, 64))
    """
    block = min(MOST_COLUMNS, triton.next_power_of_2(size))
    return TILE // block, block


def programs(weight: Tensor, size: int) -> tuple[int, int]:
    """The launch grid for a weight ``(rows, columns)`` in groups of ``size``."""
    return -(-weight.shape[0] // tile(size)[0]), weight.shape[1] // size
