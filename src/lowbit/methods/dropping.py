"""Dropping channels: those that a linear misses least go, and its other columns make up for them.

Source: the optimal brain surgeon (Hassibi and Stork, NIPS 1992) on a linear's inputs. With their damped second
moments ``G``, the channel of least ``||w_i||^2 / [G^-1]_ii`` goes, the weight becomes ``W - w_i [G^-1]_i /
[G^-1]_ii``, the least-squares answer of what is left, and ``G^-1`` is downdated. At run time a gather is left of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError


class DropPlan:
    """Channels that can go, cheapest first, with the weights' answer to each.

    One sequence of drops serves all candidates, taken in the order of their numbers of copies.

    Attributes:
        weight: ``(out, channels)`` float64, compensated for what has gone.
        inverse: of the damped second moments, downdated, ``(channels, channels)`` float64.
        order: channels that have gone, in order.
    """

    def __init__(self, weight: Tensor, gram: Tensor, damping: float, keep: Tensor) -> None:
        """``keep`` ``(channels,)`` marks channels that never go; a float64 ``gram`` is overwritten by the inverse.

        Raises:
            LowbitError: ``gram`` is not finite, or too near singular for ``damping``.
        """
        self.weight, self.keep = weight.double(), keep
        self.inverse = damped_inverse(gram.double(), damping)
        self.order: list[int] = []

    def without(self, count: int, copies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The channels in their new order, each one's divisor, and the compensated weight ``(out, channels)``.

        ``count`` channels go, no fewer than at the call before; every split one is there ``copies`` times, at its old
        place and at those that became free.
        """
        while len(self.order) < count:
            self._drop()
        gone = torch.zeros(len(self.inverse), dtype=torch.bool, device=self.inverse.device)
        gone[self.order] = True
        split = copies > 1
        idx = torch.arange(len(self.inverse), device=self.inverse.device)
        idx[gone] = idx[split].repeat_interleave(copies[split] - 1)
        return idx, copies[idx].to(self.weight.dtype), self.weight.clone()

    def _drop(self) -> None:
        """The channel of least ``||w_i||^2 / [G^-1]_ii`` goes; the others make up for it (optimal brain surgeon)."""
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
    """The inverse of ``gram + damping * mean(diagonal) * I``, in the place of ``gram`` ``(channels, channels)``.

    Beside it only the Cholesky factor is held.

    >>> found = damped_inverse(torch.diag(torch.tensor([3.0, 1.0])), 0.5)
    >>> torch.allclose(found, torch.diag(torch.tensor([0.25, 0.5])))
    True
    """
    gram.diagonal().add_(damping * gram.diagonal().mean().clamp(min=1e-30))
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed or not bool(lower.diagonal().isfinite().all()):
        raise LowbitError(
            f"reassemble: damping {damping:g} given; the second moments of a linear's input are not finite, or too "
            "near singular for it: is the model sound? Else raise reassemble.damping"
        )
    torch.cholesky_inverse(lower, out=gram.mT)  # the layout that LAPACK writes; the inverse is symmetric
    return gram
