"""One Triton kernel for RMS norm, gather and per-token quantization, for runtimes with reassembled channels.

Source: QLLM, Liu et al., arXiv 2310.08041, section 3.2, whose own kernel is not published. One program per token
reads the row once for ``rstd`` and once more in the new order (from cache), and writes codes; the gather needs no
separate pass.

Needs Triton: pip install triton. Runs on a GPU, or anywhere with ``TRITON_INTERPRET=1`` set before the import.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.errors import LowbitError


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]
    x, idx, gain, factor, codes, scales, zeros, eps, width, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    source = tl.load(idx + column, mask=inside, other=0)
    value = tl.load(x + row * width + source, mask=inside, other=0.0).to(tl.float32) * rstd
    value = value * tl.load(gain + source, mask=inside, other=0.0) * tl.load(factor + column, mask=inside, other=0.0)
    bottom, top = tl.minimum(tl.min(value, 0), 0.0), tl.maximum(tl.max(value, 0), 0.0)
    scale = (top - bottom) / (HIGH - LOW)
    scale = tl.where(scale == 0.0, 1.1920929e-07, scale)
    magic = 12582912.0  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer, ties to even
    zero = tl.minimum(tl.maximum(LOW - bottom / scale, LOW), HIGH)
    zero = (zero + magic) - magic
    code = tl.minimum(tl.maximum(value / scale + zero, LOW), HIGH)
    code = (code + magic) - magic
    tl.store(codes + row * width + column, code.to(tl.int8), mask=inside)
    tl.store(scales + row, scale)
    tl.store(zeros + row, zero)


class GatheredNorm(Protocol):
    """What the kernel needs of a ``GatheredRMSNorm``, which see."""

    eps: float
    norm_offset: float
    idx: Tensor
    factor: Tensor
    into: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The norm's own gain ``(width,)``."""


def norm_gather_quantize(norm: GatheredNorm, x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 ``(tokens, width)``, scales and zeros float32 ``(tokens,)``: ``value = (code - zero) * scale``.

    The unfused equivalent is ``norm(x)`` followed by ``IntTokens(bits, symmetric=False).fake_quant``.

    Args:
        norm: a norm whose gather merges no channels.
        x: ``(tokens, width)``, contiguous.
        bits: 2 to 8.

    Raises:
        LowbitError: the gather merges channels, or the width of ``x`` is not the norm's.
    """
    width = len(norm.idx)
    if norm.into is not None or x.ndim != 2 or x.shape[1] != width:
        merged = "" if norm.into is None else " with merged channels"
        raise LowbitError(
            f"norm_gather_quantize: a gather of {width}{merged} and x {tuple(x.shape)} given; (tokens, width) and no "
            "merged channels are allowed: reassemble with assembly 'drop'"
        )
    tokens = len(x)
    codes = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
    scales, zeros = (torch.empty(tokens, device=x.device) for _ in range(2))
    gain = (norm.weight.float() + norm.norm_offset).contiguous()
    arguments: list[Any] = [x.contiguous(), norm.idx.int(), gain, norm.factor.float().contiguous()]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    block = triton.next_power_of_2(width)
    _kernel[(tokens,)](*arguments, codes, scales, zeros, norm.eps, width, LOW=low, HIGH=high, BLOCK=block)
    return codes, scales, zeros
