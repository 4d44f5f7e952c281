"""RMS norm and gather in one module: ``x[idx] * rstd * gamma[idx] / T``, with ``rstd`` of the original channels.

A reorder is a gather whose factors are 1.

Source: QLLM, Liu et al., arXiv 2310.08041, section 3.2: the gather of reassembled channels after a norm costs no
extra pass where the norm reads its input in the new order. The products are taken in the order of the library's norm
and of ``runtime_ops.Gather``, so that the result is theirs bit for bit; folding ``gamma / T`` into one number would
round differently, and a value on the boundary between two codes would change its code.

LayerNorm and dense matrices use a forward hook instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.models import fused_kernels
from lowbit.models.reorder import Reorder
from lowbit.models.runtime_ops import Gather, RuntimeOp, take_channels


class GatheredRMSNorm(nn.Module):
    """An RMS norm over ``(..., width)`` whose output is gathered; equal to the norm followed by the ``Gather``.

    Attributes:
        weight: the norm's own gain ``(width,)``.
        idx, factor, into: tensors of the gather, see ``Gather``.
        bits: of the integers with a zero point that every reader quantizes its input to; then a kernel quantizes here
            where one runs (``fused_kernels``), and the readers leave that out. ``None``: nothing is quantized here.
    """

    idx: Tensor
    factor: Tensor
    into: Tensor | None
    bits: int | None = None

    def __init__(self, weight: nn.Parameter, eps: float, norm_offset: float, gather: Gather) -> None:
        """``norm_offset``: the norm multiplies by ``norm_offset + weight``; if that is not 0, in float32 (Gemma)."""
        super().__init__()
        self.weight, self.eps, self.norm_offset = weight, eps, norm_offset
        # Buffers move with the model to another device; non-persistent ones are not in its state dict.
        for name in ("idx", "factor", "into"):
            self.register_buffer(name, getattr(gather, name), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width) -> (..., width)`` in the dtype of ``x``."""
        if self.bits is not None and fused_kernels.on_kernels(x):
            return self.fused(x)
        x_float = x.float()
        rstd = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        out = self._normed(x_float, rstd, self.idx, x.dtype)
        if self.into is not None:
            merged = torch.nonzero(self.into >= 0).flatten()
            out = out.index_add(-1, self.into[merged], self._normed(x_float, rstd, merged, x.dtype))
        return out * self.factor.to(x.dtype)

    def fused(self, x: Tensor) -> Tensor:
        """The result quantized per token and dequantized, by one kernel; ``bits`` is set and no channel is merged."""
        from lowbit.models.gathered_norm_triton import norm_gather_quantize

        assert self.bits is not None
        codes, scales, zeros = norm_gather_quantize(self, x.reshape(-1, x.shape[-1]), self.bits)
        return ((codes.float() - zeros[:, None]) * scales[:, None]).to(x.dtype).reshape(x.shape)

    def _normed(self, x_float: Tensor, rstd: Tensor, idx: Tensor, dtype: torch.dtype) -> Tensor:
        normed = take_channels(x_float, idx) * rstd
        if self.norm_offset:
            return (normed * (self.norm_offset + self.weight[idx].float())).to(dtype)
        return self.weight[idx] * normed.to(dtype)


def gathered_norm(norm: nn.Module, norm_offset: float, op: RuntimeOp) -> GatheredRMSNorm | None:
    """The module that replaces ``norm`` and its gather, or ``None`` where they cannot be fused.

    ``None`` for a LayerNorm (it subtracts the mean and has a bias) and for any op other than a gather or a reorder.
    """
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = norm.get_parameter("weight")
    if isinstance(norm, nn.LayerNorm) or eps is None or not isinstance(weight, nn.Parameter):
        return None
    if isinstance(op, Reorder):
        op = op.gather
    if not isinstance(op, Gather) or "RMSNorm" not in type(norm).__name__:
        return None
    return GatheredRMSNorm(weight, float(eps), norm_offset, op)
