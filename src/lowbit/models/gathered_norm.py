"""Norm and gather in one module: ``x[idx] * rstd * gamma[idx] / T``, with ``rstd`` of the original channels.

Source: QLLM, Liu et al., arXiv 2310.08041, section 3.2: after a norm the gather of reassembled channels costs no pass
of its own where the norm reads its input in the new order. The products are taken in the order of the library's norm
and of ``runtime_ops.Gather``, so that the result is theirs bit for bit; folding ``gamma / T`` into one number would
round differently, and a value at the edge between two codes would change its code.

LayerNorm and dense matrices keep the hook.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.models.runtime_ops import Gather, RuntimeOp, take_channels


class GatheredRMSNorm(nn.Module):
    """An RMS norm over ``(..., width)`` whose output is gathered; equal to the norm with the ``Gather`` behind it.

    Attributes:
        weight: the norm's own gain ``(width,)``.
        idx, factor, into: the gather's, see ``Gather``.
    """

    idx: Tensor
    factor: Tensor
    into: Tensor | None

    def __init__(self, weight: nn.Parameter, eps: float, norm_offset: float, gather: Gather) -> None:
        """``norm_offset``: the norm multiplies by ``norm_offset + weight``; where it is not 0, in float32 (Gemma)."""
        super().__init__()
        self.weight, self.eps, self.norm_offset = weight, eps, norm_offset
        # Buffers follow the model to another device; they are no part of what the library would save.
        for name in ("idx", "factor", "into"):
            self.register_buffer(name, getattr(gather, name), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width) -> (..., width)`` in the dtype of ``x``."""
        whole = x.float()
        rstd = torch.rsqrt(whole.square().mean(-1, keepdim=True) + self.eps)
        out = self._part(whole, rstd, self.idx, x.dtype)
        if self.into is not None:
            gone = torch.nonzero(self.into >= 0).flatten()
            out = out.index_add(-1, self.into[gone], self._part(whole, rstd, gone, x.dtype))
        return out * self.factor.to(x.dtype)

    def _part(self, whole: Tensor, rstd: Tensor, idx: Tensor, dtype: torch.dtype) -> Tensor:
        normed = take_channels(whole, idx) * rstd
        if self.norm_offset:
            return (normed * (self.norm_offset + self.weight[idx].float())).to(dtype)
        return self.weight[idx] * normed.to(dtype)


def gathered_norm(norm: nn.Module, norm_offset: float, op: RuntimeOp) -> GatheredRMSNorm | None:
    """The module that takes the place of ``norm`` and its gather, or ``None`` where they cannot be one.

    ``None`` for a LayerNorm (it subtracts a mean, and has a bias) and for any other op.
    """
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = norm.get_parameter("weight")
    if isinstance(norm, nn.LayerNorm) or eps is None or not isinstance(weight, nn.Parameter):
        return None
    if not isinstance(op, Gather) or "RMSNorm" not in type(norm).__name__:
        return None
    return GatheredRMSNorm(weight, float(eps), norm_offset, op)
