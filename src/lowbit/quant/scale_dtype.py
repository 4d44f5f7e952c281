"""The dtype of stored scales, for formats that let one choose it, and its spelling behind a format's name.

``w4g128-sym`` has float16 scales and ``fp8`` bfloat16 ones; ``w4g128-sym:bf16`` and ``fp8:f32`` have others. Codes
that another tool chose come with scales in its dtype, and a runtime's file may hold one dtype only.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import LowbitError, unknown
from lowbit.quant.floating import FLOATS, FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.scales import Plain

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def scale_dtype_of(format: Format) -> torch.dtype | None:
    """The dtype of a format's scales; ``None`` where the format fixes it.

    >>> scale_dtype_of(FLOATS["fp8"]), scale_dtype_of(FLOATS["mxfp4"])
    (torch.bfloat16, None)
    """
    if isinstance(format, FloatFormat):
        return format.scales.dtype if isinstance(format.scales, Plain) else None
    return format.scale_dtype if isinstance(format, IntFormat) else None


def with_scale_dtype(format: Format, dtype: torch.dtype) -> Format:
    """The format with scales in ``dtype``; formats that fix it are unchanged."""
    if isinstance(format, FloatFormat):
        return replace(format, scales=Plain(dtype)) if isinstance(format.scales, Plain) else format
    return replace(format, scale_dtype=dtype) if isinstance(format, IntFormat) else format


def suffix_of(format: Format) -> str:
    """What follows the format's name: ``:f32``, or nothing for the dtype that it has by default.

    >>> suffix_of(IntFormat(4)), suffix_of(with_scale_dtype(FLOATS["fp8"], torch.float32))
    ('', ':f32')
    """
    default = scale_dtype_of(FLOATS[format.label] if isinstance(format, FloatFormat) else IntFormat(8))
    dtype = scale_dtype_of(format)
    return "" if dtype in (None, default) else f":{next(key for key, value in DTYPES.items() if value == dtype)}"


def with_suffix(format: Format, suffix: str, text: str) -> Format:
    """The inverse of ``suffix_of``: ``suffix`` without its colon, from the user's ``text``.

    Raises:
        LowbitError: there is no such dtype, or the format has no choice of one.
    """
    if suffix not in DTYPES:
        raise unknown(f"dtype of scales in '{text}'", suffix, DTYPES)
    if scale_dtype_of(format) is None:
        raise LowbitError(
            f"'{text}' given; {format.name} says itself how its scales are stored: leave out ':{suffix}'"
        )
    return with_scale_dtype(format, DTYPES[suffix])


def holding(scales: Tensor) -> set[str]:
    """The dtypes, as in ``DTYPES``, that hold every scale exactly.

    >>> sorted(holding(torch.tensor([1 + 2**-9]))), sorted(holding(torch.tensor([2.0**40])))
    (['f16', 'f32'], ['bf16', 'f32'])
    """
    return {name for name, dtype in DTYPES.items() if torch.equal(scales.to(dtype).to(scales.dtype), scales)}
