"""Channel assembly: like channels after a norm become one, their mean, to make room for copies of outliers.

Source: QLLM, Liu et al., ICLR 2024, arXiv 2310.08041, section 3.2.2. Two channels ``i`` and ``j`` become
``(x_i + x_j) / 2`` with the weight column ``w_i + w_j``; a group of any size becomes its mean, with the sum of the
columns. A merge leaves the residual ``(x_i - x_j) (w_i - w_j) / 2``, and the paper's distance (equation 5), summed
over tokens and outputs, factorises:

    D(i, j) = ||x_i - x_j||^2 ||w_i - w_j||^2 / 4

so that the inputs' second moments and the weight are all that is needed; no loop over tokens or outputs.

Matching (Bolya et al., ToMe, arXiv 2210.09461, as QLLM takes it): even channels on one side, odd ones on the other;
an even one merges into an odd one and goes. ``bipartite``, the paper's: each even channel points at its closest odd
one and the cheapest of these go, several into one if need be. ``one-to-one``: the cheapest pair of channels that are
both still alone, again and again; then no dozen can land on one weak channel, whose summed column would set the
weights' range. Channels that are split are on neither side.

The released code takes ``||x_i - x_j||^2 (s_i + s_j)^2`` with ``s`` the signed sum of a channel's weights: the sign
is not that of the residual, and it can vanish for unlike channels. It is not offered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError, unknown

ASSEMBLIES = ("drop", "bipartite", "one-to-one")


def check_assembly(assembly: str, sites: str) -> None:
    """Refuse what no run folder can hold.

    Raises:
        LowbitError: ``pad``, an unknown choice, or merging where only down_proj is asked for.
    """
    if assembly == "pad":
        raise LowbitError(
            "reassemble.assembly 'pad' given: a checkpoint has one hidden_size and one intermediate_size for all "
            f"layers, so no layer can be wider than the others; allowed: {', '.join(ASSEMBLIES)}"
        )
    if assembly not in ASSEMBLIES:
        raise unknown("reassemble.assembly", assembly, ASSEMBLIES)
    if assembly != "drop" and sites == "down":
        raise LowbitError(
            f"reassemble: assembly '{assembly}' with sites 'down' given: before down_proj channels are products, and "
            "a mean of products is no product of means; take assembly 'drop', or sites 'norms' or 'all'"
        )


def distances(gram: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``D(i, j)`` for ``i`` in ``first`` and ``j`` in ``second``: ``(len(first), len(second))`` float64.

    Two matrices of that shape are held beside ``gram``; with halves of the channels they are a quarter of it each.

    Args:
        gram: the inputs' second moments ``(channels, channels)``, ``sum_t x_t x_t^T``.
        weight: ``(out, channels)``, all linears that read the channels, one below the other.
        first: indices of channels.
        second: indices of channels.

    >>> x, w = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 5.0]])
    >>> distances(x.T @ x, w, torch.tensor([0]), torch.tensor([1])).tolist()
    [[9.0]]
    """
    energy = gram.diagonal().double()
    inputs = gram[first[:, None], second].double()
    inputs.mul_(-2).add_(energy[first][:, None]).add_(energy[second]).clamp_(min=0)
    columns = weight.double().square().sum(0)
    between = weight[:, first].double().T @ weight[:, second].double()
    between.mul_(-2).add_(columns[first][:, None]).add_(columns[second]).clamp_(min=0)
    return inputs.mul_(between).mul_(0.25)


class MergePlan:
    """Channels that can merge, cheapest first.

    One sequence of merges serves all candidates, taken in the order of their numbers of copies.

    Attributes:
        weight: ``(out, channels)`` float64 as given.
        left: the distances ``(even, odd)`` between those that may still merge; infinite for others.
        merges: ``(even, odd)`` pairs in order.
    """

    def __init__(self, weight: Tensor, gram: Tensor, keep: Tensor, one_to_one: bool) -> None:
        """``keep`` ``(channels,)`` marks channels that are on neither side; see the module for the rest."""
        self.weight, self.one_to_one = weight.double(), one_to_one
        free = torch.nonzero(~keep).flatten()
        self.even, self.odd = free[free % 2 == 0], free[free % 2 == 1]
        self.left = distances(gram, weight, self.even, self.odd)
        self.merges: list[tuple[int, int]] = []

    @property
    def most(self) -> int:
        """The largest number of channels that can go."""
        if not len(self.odd):
            return 0
        return min(len(self.even), len(self.odd)) if self.one_to_one else len(self.even)

    def without(self, count: int, copies: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What ``reassemble.fold`` takes: order, divisors, weight ``(out, channels)``, and where merged channels go.

        ``count`` channels go, no fewer than at the call before, and at most ``most``; every split one is there
        ``copies`` times, at its old place and at those that became free.
        """
        while len(self.merges) < count:
            i, j = divmod(int(self.left.argmin()), self.left.shape[1])
            self.left[i] = torch.inf
            if self.one_to_one:
                self.left[:, j] = torch.inf
            self.merges.append((int(self.even[i]), int(self.odd[j])))
        idx = torch.arange(len(copies), device=copies.device)
        into, size, weight = torch.full_like(idx, -1), torch.ones_like(idx), self.weight.clone()
        for gone, stays in self.merges:
            into[gone] = stays
            size[stays] += 1
            weight[:, stays] += self.weight[:, gone]
        split = copies > 1
        idx[into >= 0] = idx[split].repeat_interleave(copies[split] - 1)
        divisor = torch.where(split, copies, size)[idx].to(weight.dtype)
        return idx, divisor, weight, into
