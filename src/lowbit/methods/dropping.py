"""Channel dropping: the input channels of least cost are removed, and the other columns compensate for them.

Source: optimal brain surgeon (Hassibi and Stork, NIPS 1992), applied to a linear's inputs. With their damped second
moments ``G``, the channel of least ``||w_i||^2 / [G^-1]_ii`` is removed, the weight becomes ``W - w_i [G^-1]_i /
[G^-1]_ii``, the least-squares solution on the remaining channels, and ``G^-1`` is downdated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.finite import is_finite


class DropPlan:
    """A sequence of channel drops, cheapest first, with compensated weights.

    One sequence serves all candidates, visited in increasing order of their numbers of copies.

    Attributes:
        weight: ``(out, channels)`` float64, compensated for the dropped channels.
        inverse: inverse of the damped second moments, downdated, ``(channels, channels)`` float64.
        order: the channels dropped so far, in order.
    """

    def __init__(self, weight: Tensor, gram: Tensor, damping: float, keep: Tensor) -> None:
        """``keep`` ``(channels,)`` marks channels that are never dropped; a float64 ``gram`` is overwritten.

        Raises:
            LowbitError: ``gram`` is not finite, or too close to singular for ``damping``.
        """
        self.weight, self.keep = weight.double(), keep
        self.inverse = damped_inverse(gram.double(), damping)
        self.order: list[int] = []

    def without(self, count: int, copies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Index and divisor of each new channel, and the compensated weight ``(out, channels)``.

        ``count`` channels are dropped, at least as many as at the previous call; every split channel appears
        ``copies`` times, at its own index and at freed ones.
        """
        while len(self.order) < count:
            self._drop()
        dropped = torch.zeros(len(self.inverse), dtype=torch.bool, device=self.inverse.device)
        dropped[self.order] = True
        split = copies > 1
        idx = torch.arange(len(self.inverse), device=self.inverse.device)
        idx[dropped] = idx[split].repeat_interleave(copies[split] - 1)
        return idx, copies[idx].to(self.weight.dtype), self.weight.clone()

    def _drop(self) -> None:
        """Drop the channel of least ``||w_i||^2 / [G^-1]_ii`` and compensate for it (optimal brain surgeon)."""
        cost = self.weight.square().sum(0) / self.inverse.diagonal().clamp(min=1e-30)
        cost[self.keep] = torch.inf
        cost[self.order] = torch.inf
        i = int(cost.argmin())
        column, row = self.inverse[:, i].clone(), self.inverse[i] / self.inverse[i, i]
        self.weight.addr_(self.weight[:, i].clone(), row, alpha=-1)
        self.inverse.addr_(column, row, alpha=-1)
        self.weight[:, i] = 0
        self.order.append(i)


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """The inverse of ``gram + damping * mean(diagonal) * I``, in place in ``gram`` ``(channels, channels)``.

    Memory: only the Cholesky factor besides it.

    >>> inverse = damped_inverse(torch.diag(torch.tensor([3.0, 1.0])), 0.5)
    >>> torch.allclose(inverse, torch.diag(torch.tensor([0.25, 0.5])))
    True
    """
    gram.diagonal().add_(damping * gram.diagonal().mean().clamp(min=1e-30))
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed or not is_finite(lower.diagonal()):
        raise LowbitError(
            f"reassemble: damping {damping:g}; the second moments of a linear's input are not finite or too "
            "close to singular: check the model's weights for NaN and infinity, or raise reassemble.damping"
        )
    torch.cholesky_inverse(lower, out=gram.mT)  # LAPACK's column-major layout; the inverse is symmetric
    return gram
