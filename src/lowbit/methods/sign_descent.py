"""Steps along the sign of the gradient: SignSGD, and with momentum the sign of its running mean.

Sources: SignRound (Cheng et al., 2023, arXiv 2309.05516), which uses the sign alone: an offset that is bounded needs
no size of a gradient, only a side. With ``momentum`` a step is that of Lion (Chen et al., 2023, arXiv 2302.06675)
with equal betas and without weight decay, for losses whose gradients are noisy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NoMoments(NamedTuple):
    """The state of a tensor without momentum."""


class Momentum(NamedTuple):
    """The running mean of a tensor's gradients."""

    mean: Tensor


class SignDescent:
    """The optimizer of ``(tensors, learning rate)`` groups: each entry moves by exactly the rate.

    Attributes:
        tensors: all tensors, in the order of the groups.
        rates: their learning rates.
        moments: their states.
        momentum: share of the running mean that stays; 0 takes the gradient itself.

    >>> x = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    >>> x.grad = torch.tensor([3.0, -1e-9, 0.0])
    >>> SignDescent([([x], 0.25)]).step(1.0)
    >>> x.tolist()
    [0.75, 1.25, 1.0]
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], momentum: float = 0.0) -> None:
        self.tensors = [tensor for tensors, _ in groups for tensor in tensors]
        self.rates = [lr for tensors, lr in groups for _ in tensors]
        self.momentum = momentum
        self.moments: list[NoMoments | Momentum] = [
            Momentum(torch.zeros_like(tensor)) if momentum else NoMoments() for tensor in self.tensors
        ]

    def counted(self) -> None:
        """Nothing: a step depends on no counter."""

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update from the tensors' gradients, with learning rates times ``factor``."""
        for tensor, lr, moments in zip(self.tensors, self.rates, self.moments, strict=True):
            if tensor.grad is None or lr == 0:
                continue
            if isinstance(moments, Momentum):
                direction = moments.mean.lerp_(tensor.grad, 1 - self.momentum).sign()
            else:
                direction = tensor.grad.sign_()
            tensor.sub_(direction, alpha=lr * factor)
