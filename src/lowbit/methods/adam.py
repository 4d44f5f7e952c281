"""AdamW without weight decay and with one step counter per *entry*.

An entry that a mask opens late starts with zero moments; a step counter shared by the tensor would make its first
step about three times too long. Where every entry is trained from the start, this equals ``torch.optim.AdamW`` up to
the order of operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8


class Adam:
    """AdamW without weight decay and with one step counter per entry, over ``(tensors, learning rate)`` groups."""

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]]) -> None:
        flat = [(tensor, lr) for tensors, lr in groups for tensor in tensors]
        self.entries = [(t, lr, torch.zeros_like(t), torch.zeros_like(t), torch.zeros_like(t)) for t, lr in flat]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update from the tensors' gradients, with learning rates times ``factor``."""
        for tensor, lr, mean, square, count in self.entries:
            if tensor.grad is None or lr == 0:
                continue
            grad = tensor.grad
            count.add_(((count > 0) | (grad != 0)).to(count.dtype))
            mean.lerp_(grad, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            steps = count.clamp(min=1)
            size = (square / (1 - BETAS[1] ** steps)).sqrt_().add_(EPS)
            tensor.addcdiv_(mean / (1 - BETAS[0] ** steps), size, value=-lr * factor)
