"""Integers rounded with an offset, forward and backward in one piece: the inner loop of learned rounding.

``value = (clamp(round(w / s + v) + z, 0, levels) - z) * s``. Rounding is straight-through, so with ``k`` for the code
less its zero point and ``i`` for 1 inside the range and 0 where the clamp holds, the gradients of ``g`` are

* offset: ``g i s``;
* scale: ``sum g (k - i w / s)`` over the group: ``k`` is what the scale multiplies, ``w / s`` what it divides;
* zero: ``- sum g (1 - i) s``: inside the range the zero point cancels.

As separate operations, each of which autograd differentiates, this takes twice the passes over the weight, and these
are a third of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RoundedWithOffset(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
        unclamped = (weight / scale).add_(offset).round_().add_(zero)
        steps = unclamped.clamp(0, levels)
        inside = steps == unclamped
        steps.sub_(zero)
        ctx.save_for_backward(weight, scale, steps, inside)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, steps, inside = ctx.saved_tensors
        (given,) = grad
        of_offset, of_scale, of_zero = ctx.needs_input_grad[1:4]
        within = given * inside
        offset_grad = scale_grad = zero_grad = None
        if of_scale:
            direct = (given * steps).sum(-1, keepdim=True)
            scale_grad = direct - (within * weight).sum(-1, keepdim=True) / scale
        if of_zero:
            zero_grad = (within.sum(-1, keepdim=True) - given.sum(-1, keepdim=True)) * scale
        if of_offset:
            offset_grad = within.mul_(scale)
        return None, offset_grad, scale_grad, zero_grad, None


def rounded_with_offset(weight: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Values of the codes of ``weight`` with an offset, as the module says.

    Args:
        weight: ``(rows, groups, size)``; no gradient reaches it.
        offset: the same shape, in codes.
        scale, zero: ``(rows, groups, 1)``.
        levels: the largest code.

    >>> one = torch.ones(1, 1, 1)
    >>> weight, offset = torch.tensor([[[0.4, 0.4, 5.0]]]), torch.tensor([[[0.0, 0.2, 0.0]]])
    >>> rounded_with_offset(weight, offset, one, one, 3).tolist()
    [[[0.0, 1.0, 2.0]]]
    """
    return _RoundedWithOffset.apply(weight, offset, scale, zero, levels)
