"""Integer codes with scales and zero points, whatever tensors they come from, as a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quant.bit_stream import unpack_from_int32
from lowbit.quant.format import QParams, QTensor
from lowbit.quant.integer import MAX_BITS, MIN_BITS, IntFormat
from lowbit.sources.layout import Decoded, FloatOnly, expect

SCALES = (torch.float16, torch.bfloat16, torch.float32)


def dense(words: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Unsigned codes ``int16 (rows, columns)`` of dense int32 words ``(rows, words)``, low bits first.

    >>> dense(torch.tensor([[0x21]], dtype=torch.int32), 4, 1, 3).tolist()
    [[1, 2, 0]]
    """
    signed = unpack_from_int32(words.contiguous(), bits, torch.Size((rows, columns)))
    return signed.to(torch.int16) + 2 ** (bits - 1)


def integers(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int | None, order: Tensor | None = None
) -> Decoded:
    """A weight of unsigned codes.

    Args:
        codes: ``(rows, columns)``, from 0 to ``2**bits - 1``.
        scale: ``(rows, groups)``, in the dtype in which it is stored.
        zero: ``(rows, groups)``, in the codes' range; ``None``: fixed at the middle.
        bits: of a code.
        group: values that share a scale; ``None``: a row. The last group of a row may be shorter.
        order: the group of each column, ``(columns,)``; ``None``: groups are consecutive columns.

    Raises:
        ValueError: ``order`` has another shape, or names a group that is not there.

    >>> codes, scale = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1.0, 10.0]])
    >>> integers(codes, scale, None, 2, 2).dequantize().tolist()
    [[-2.0, -1.0, 0.0, 10.0]]
    >>> integers(codes, scale, None, 2, 2, torch.tensor([0, 1, 0, 1])).dequantize().tolist()
    [[-2.0, -10.0, 0.0, 10.0]]
    """
    columns, size = codes.shape[1], group or codes.shape[1]
    middle = 2 ** (bits - 1)
    wide = scale.to(torch.float32)
    points = torch.full_like(wide, middle) if zero is None else zero.to(torch.float32)
    consecutive = torch.arange(columns) // size
    groups = consecutive if order is None else _checked(order, columns, scale.shape[1])
    why = None
    if not MIN_BITS <= bits <= MAX_BITS:
        why = f"its codes have {bits} bit"
    elif not torch.equal(groups, consecutive):
        why = "its groups are in activation order (desc_act)"
    elif columns % size:
        why = f"groups of {size} do not divide its width of {columns}"
    if why is not None:
        return FloatOnly((codes.to(torch.float32) - points[:, groups]) * wide[:, groups], why)
    format = IntFormat(bits, group, bool((points == middle).all()), scale.dtype)
    return QTensor(codes.to(torch.uint8), QParams(wide.contiguous(), points.contiguous()), format)


def _checked(order: Tensor, columns: int, groups: int) -> Tensor:
    expect("g_idx", order, [torch.int32, torch.int64], [columns])
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise ValueError(f"g_idx names groups {int(order.min())} to {int(order.max())}, there are {groups}")
    return order.long()
