"""AdamW without weight decay, with one step counter per *entry* and an epsilon relative to the tensor's gradients.

An entry that a mask opens late starts with zero moments; a step counter shared by the tensor would make its first
step about three times too long.

Adam's epsilon of 1e-8 is absolute: where gradients come near it, steps shrink, so that the scale of the loss decides
how fast is learned. Errors here are relative to the block's output, and the gradient of a clipping ratio falls with
the number of groups: at two bits, groups of 64 and the width of a 7B model it is of the order of 1e-9. So epsilon is
1e-8 of the root mean square of the tensor's gradients, and a loss times any factor gives the same steps. Where that
root mean square is 1 and every entry is trained from the start, this equals ``torch.optim.AdamW`` up to the order of
operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8


class Moments(NamedTuple):
    """Running means of a tensor's gradients and of their squares, and the steps that each entry has taken."""

    mean: Tensor
    square: Tensor
    steps: Tensor


class Adam:
    """The optimizer of ``(tensors, learning rate)`` groups; see the module docstring.

    Attributes:
        tensors: all tensors, in the order of the groups.
        rates: their learning rates.
        moments: their moments.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]]) -> None:
        self.tensors = [tensor for tensors, _ in groups for tensor in tensors]
        self.rates = [lr for tensors, lr in groups for _ in tensors]
        self.moments = [Moments(*(torch.zeros_like(t) for _ in Moments._fields)) for t in self.tensors]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update from the tensors' gradients, with learning rates times ``factor``."""
        for tensor, lr, (mean, square, taken) in zip(self.tensors, self.rates, self.moments, strict=True):
            if tensor.grad is None or lr == 0:
                continue
            grad = tensor.grad
            taken.add_(((taken > 0) | (grad != 0)).to(taken.dtype))
            mean.lerp_(grad, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            steps = taken.clamp(min=1)
            power = square / (1 - BETAS[1] ** steps)
            # The smallest number keeps 0 / 0 out where no entry has had a gradient.
            epsilon = (EPS * power.mean().sqrt()).clamp(min=torch.finfo(power.dtype).tiny)
            tensor.addcdiv_(mean / (1 - BETAS[0] ** steps), power.sqrt_().add_(epsilon), value=-lr * factor)
