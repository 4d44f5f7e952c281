"""Channel assembly: similar channels after a norm merge into their mean, to make room for copies of outliers.

Source: QLLM, Liu et al., ICLR 2024, arXiv 2310.08041, section 3.2.2. Two channels ``i`` and ``j`` become
``(x_i + x_j) / 2`` with the weight column ``w_i + w_j``; a group of any size becomes its mean, with the sum of the
columns. A merge leaves the residual ``(x_i - x_j) (w_i - w_j) / 2``, and the paper's distance (equation 5), summed
over tokens and outputs, factorises:

    D(i, j) = ||x_i - x_j||^2 ||w_i - w_j||^2 / 4

so that it needs only the inputs' second moments and the weight, without a loop over tokens or outputs.

Matching (Bolya et al., ToMe, arXiv 2210.09461, as used by QLLM): even channels form one side, odd channels the other;
an even channel merges into an odd one and is removed. ``bipartite``, the paper's: each even channel selects its
closest odd one and the cheapest pairs merge; several may share one odd channel. ``one-to-one``: repeatedly merge the
cheapest pair of which neither is merged, so that many channels cannot collect in one weak channel, whose summed
column would then set the weights' range. Split channels are on neither side.

The released implementation uses ``||x_i - x_j||^2 (s_i + s_j)^2`` with ``s`` the signed sum of a channel's weights.
Its sign differs from the residual's and it can vanish for dissimilar channels, so it is not offered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError, unknown

ASSEMBLIES = ("drop", "bipartite", "one-to-one")


def check_assembly(assembly: str, sites: str) -> None:
    """Refuse an assembly that a run folder cannot store.

    Raises:
        LowbitError: ``pad``, an unknown choice, or merging with ``sites: down``.
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
            "a mean of products is not a product of means; choose assembly 'drop', or sites 'norms' or 'all'"
        )


def distances(gram: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``D(i, j)`` for ``i`` in ``first`` and ``j`` in ``second``: ``(len(first), len(second))`` float64.

    Memory: two matrices of that shape beside ``gram``; for halves of the channels, each is a quarter of its size.

    Args:
        gram: the inputs' second moments ``(channels, channels)``, ``sum_t x_t x_t^T``.
        weight: ``(out, channels)``, the stacked weights of all linears that read the channels.
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
    """A sequence of channel merges, cheapest first.

    One sequence serves all candidates, visited in increasing order of their numbers of copies.

    Attributes:
        weight: ``(out, channels)`` float64, before any merge.
        left: distances ``(even, odd)`` of the pairs that may still merge; infinite for others.
        merges: the ``(even, odd)`` pairs merged so far, in order.
    """

    def __init__(self, weight: Tensor, gram: Tensor, keep: Tensor, one_to_one: bool) -> None:
        """``keep`` ``(channels,)`` marks the channels on neither side; see the module docstring for the matching."""
        self.weight, self.one_to_one = weight.double(), one_to_one
        free = torch.nonzero(~keep).flatten()
        self.even, self.odd = free[free % 2 == 0], free[free % 2 == 1]
        self.left = distances(gram, weight, self.even, self.odd)
        self.merges: list[tuple[int, int]] = []

    @property
    def most(self) -> int:
        """The largest number of channels that can merge."""
        if not len(self.odd):
            return 0
        return min(len(self.even), len(self.odd)) if self.one_to_one else len(self.even)

    def without(self, count: int, copies: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments of ``reassemble.fold``: index, divisors, weight ``(out, channels)``, targets of merged channels.

        ``count`` channels merge, at least as many as at the previous call and at most ``most``; every split channel
        appears ``copies`` times, at its own index and at freed ones.
        """
        while len(self.merges) < count:
            i, j = divmod(int(self.left.argmin()), self.left.shape[1])
            self.left[i] = torch.inf
            if self.one_to_one:
                self.left[:, j] = torch.inf
            self.merges.append((int(self.even[i]), int(self.odd[j])))
        idx = torch.arange(len(copies), device=copies.device)
        into, size, weight = torch.full_like(idx, -1), torch.ones_like(idx), self.weight.clone()
        for merged, target in self.merges:
            into[merged] = target
            size[target] += 1
            weight[:, target] += self.weight[:, merged]
        split = copies > 1
        idx[into >= 0] = idx[split].repeat_interleave(copies[split] - 1)
        divisor = torch.where(split, copies, size)[idx].to(weight.dtype)
        return idx, divisor, weight, into
