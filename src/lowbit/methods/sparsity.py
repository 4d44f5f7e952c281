"""Which weights of a linear become 0: ``n`` of ``m`` consecutive inputs of a row, or a share wherever they are.

Removing weight ``w`` of column ``c``, with all later columns free to make up for it, costs ``w^2 / [H^-1]_cc``, where
``H`` has the rows and columns from ``c`` on (Optimal Brain Surgeon). In the upper Cholesky factor ``U`` of the whole
inverse that is ``(w / U_cc)^2``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Pattern(ABC):
    """A rule for the columns that are decided together."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Consecutive columns that are decided together, when the first of them is reached."""

    @property
    @abstractmethod
    def by_row(self) -> bool:
        """Whether a row's weights are decided by that row alone."""

    @abstractmethod
    def kept(self, weight: Tensor, diagonal: Tensor) -> Tensor:
        """Which weights stay ``(columns, out)``.

        Args:
            weight: the columns as they are now, ``(columns, out)``.
            diagonal: ``U_cc`` of these columns ``(columns,)``.
        """


@dataclass(frozen=True)
class OfEach(Pattern):
    """At most ``most`` weights of ``columns`` consecutive ones of a row stay, those that cost the most.

    >>> weight = torch.tensor([[4.0], [-1.0], [3.0], [2.0]])
    >>> OfEach(2, 4).kept(weight, torch.ones(4)).flatten().tolist()
    [True, False, True, False]
    >>> OfEach(2, 4).kept(weight, torch.tensor([4.0, 1.0, 1.0, 1.0])).flatten().tolist()
    [False, False, True, True]
    """

    most: int
    of: int

    @property
    def columns(self) -> int:
        """``of``."""
        return self.of

    @property
    def by_row(self) -> bool:
        """Of each row as many."""
        return True

    def kept(self, weight: Tensor, diagonal: Tensor) -> Tensor:
        """The largest costs of each row; of equal ones the first columns'."""
        order = (weight / diagonal[:, None]).square().sort(dim=0, descending=True, stable=True).indices
        return torch.zeros_like(weight, dtype=torch.bool).scatter_(0, order[: self.most], True)


@dataclass(frozen=True)
class Share(Pattern):
    """A share of the weights in every ``width`` columns becomes 0, whatever their rows.

    >>> Share(0.5, 2).kept(torch.tensor([[4.0, 3.0], [1.0, 2.0]]), torch.ones(2)).tolist()
    [[True, True], [False, False]]
    """

    zeros: float
    width: int

    @property
    def columns(self) -> int:
        """``width``."""
        return self.width

    @property
    def by_row(self) -> bool:
        """Rows compete with each other."""
        return False

    def kept(self, weight: Tensor, diagonal: Tensor) -> Tensor:
        """All but the share with the least costs."""
        cost = (weight / diagonal[:, None]).square().flatten()
        removed = cost.sort(stable=True).indices[: round(self.zeros * cost.numel())]
        return torch.ones_like(cost, dtype=torch.bool).scatter_(0, removed, False).view_as(weight)
