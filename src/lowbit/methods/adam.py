"""AdamW without weight decay and with a step counter for each *entry*.

An entry that a mask releases late starts with moments of zero, and a counter that had run all the time would make its
first step about three times too long. Where every entry takes part from the start this is ``torch.optim.AdamW``, bit
for bit up to the order of operations; a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8


class Adam:
    """AdamW without decay and with a step counter for each entry, over ``(tensors, learning rate)`` groups."""

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]]) -> None:
        flat = [(tensor, lr) for tensors, lr in groups for tensor in tensors]
        self.entries = [(t, lr, torch.zeros_like(t), torch.zeros_like(t), torch.zeros_like(t)) for t, lr in flat]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step along the tensors' gradients with the learning rates times ``factor``."""
        for tensor, lr, mean, square, count in self.entries:
            if tensor.grad is None or lr == 0:
                continue
            grad = tensor.grad
            count.add_(((count > 0) | (grad != 0)).to(count.dtype))
            mean.lerp_(grad, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            since = count.clamp(min=1)
            size = (square / (1 - BETAS[1] ** since)).sqrt_().add_(EPS)
            tensor.addcdiv_(mean / (1 - BETAS[0] ** since), size, value=-lr * factor)
