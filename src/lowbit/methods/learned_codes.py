"""Three ways to learn the codes of a weight: an offset before rounding, a gate between two codes, a choice.

Each starts at given codes, from *latent* weights whose nearest codes these are; ``position`` is theirs in units of
codes, for any format. ``values`` are what training differentiates, ``chosen`` the values of the codes that ship.

=========== ================================================================================================
``sign``    SignRound (Cheng et al., 2023, arXiv 2309.05516, equation 3): ``round(position + V)`` with a bounded
            ``V``, straight-through; training sees the very codes that ship
``sigmoid`` AdaRound (Nagel et al., ICML 2020, arXiv 2004.10568, equations 22 to 24): ``floor(position) + h(V)`` with
            a rectified sigmoid ``h``, driven to 0 or 1 by ``1 - |2 h - 1| ** beta``
``gumbel``  GSQ (Dadgarnia et al., 2026, arXiv 2604.18556): a mean of neighbouring codes' values, weighted by a
            softmax of logits with Gumbel noise, whose temperature falls
=========== ================================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.quant.format import Format, QParams, QTensor

INSIDE = 0.49  # of a cell: how near its edge a latent weight may start
FIRM = 1e-3  # by which a gate or a logit starts on the side of the given code, where both are as near


@dataclass(frozen=True)
class Start:
    """Where learning starts.

    Attributes:
        latent: weights ``(rows, columns)``; their nearest codes are the given ones.
        qparams: the given ones, ``(rows, groups)`` each.
        format: of the codes.
        bound: how far from a latent weight's position a code may be, in codes, beyond the half that rounding takes.
    """

    latent: Tensor
    qparams: QParams
    format: Format
    bound: float = 0.5

    @property
    def per_column(self) -> QParams:
        """The qparams of each value."""
        return self.format.per_column(self.qparams, self.latent.shape[1])

    def neighbours(self) -> tuple[Tensor, Tensor]:
        """Codes within reach, the nearest first, ``(count, rows, columns)``, and their distances in codes.

        A code that the format does not have is repeated by the last one, at an infinite distance.

        >>> from lowbit.quant.integer import IntFormat
        >>> qparams, format = QParams(torch.ones(1, 1), torch.ones(1, 1)), IntFormat(2, symmetric=False)
        >>> codes, distances = Start(torch.tensor([[0.25, 0.75, 2.25]]), qparams, format).neighbours()
        >>> codes.tolist(), distances.tolist()
        ([[[1.0, 2.0, 3.0]], [[2.0, 1.0, 3.0]]], [[[0.25, 0.25, 0.25]], [[0.75, 0.75, inf]]])
        """
        qparams = self.per_column
        position, near = self.format.position(self.latent, qparams), self.format.round(self.latent, qparams)
        side = torch.where(position >= near, 1.0, -1.0).to(near.dtype)
        found = [near]
        for count in range(1, round(2 * self.bound) + 1):
            found.append(near + (side if count % 2 else -side) * ((count + 1) // 2))
        wanted = torch.stack(found)
        codes = self.format.round(self.format.value(wanted, qparams), qparams)
        distances = (codes - position).abs().where(codes == wanted, torch.inf)
        distances[0] = (near - position).abs()
        return codes, distances


def latent_weight(weight: Tensor, q: QTensor) -> Tensor:
    """Weights ``(rows, columns)`` whose nearest codes are those of ``q``: where they are already, ``weight`` itself.

    A weight whose code is another has been moved over the edge of a cell. It is as far behind the edge as it was
    before it, so that codes chosen against a small error are kept or given back as easily.

    >>> from lowbit.quant.integer import IntFormat
    >>> qparams = QParams(torch.ones(1, 1), torch.ones(1, 1))
    >>> q = QTensor(torch.tensor([[1, 2, 3]], dtype=torch.uint8), qparams, IntFormat(2, symmetric=False))
    >>> latent_weight(torch.tensor([[0.25, 0.25, 0.25]]), q).tolist()  # an edge is at 0.5; code 3 is far away
    [[0.25, 0.75, 2.0]]
    """
    qparams = q.format.per_column(q.qparams, weight.shape[1])
    codes, position = q.codes.to(qparams.scale.dtype), q.format.position(weight, qparams)
    beyond = (position - codes).abs() - 0.5
    inward = (0.5 - beyond).clamp(0, INSIDE) * torch.sign(position - codes)
    moved = q.format.value(codes + inward, qparams)
    return weight.where(q.format.round(weight, qparams) == codes, moved)


class LearnedCodes(ABC):
    """The codes of one weight while they are learned.

    Attributes:
        leaves: the learned tensors.
        unit: a learning rate of 1 over the number of steps moves a leaf this far in one step.
    """

    unit: ClassVar[float]
    leaves: list[Tensor]

    @abstractmethod
    def __init__(self, start: Start) -> None:
        """Leaves with which ``chosen`` are the given codes' values."""

    @abstractmethod
    def values(self, qparams: QParams, progress: float, noise: torch.Generator) -> Tensor:
        """Weights ``(rows, columns)`` to train with; differentiable in the leaves and the qparams.

        Args:
            qparams: ``(rows, groups)`` each.
            progress: share of the training that is done.
            noise: a generator seeded for this step and weight, on the weight's device.
        """

    @abstractmethod
    def chosen(self, qparams: QParams) -> Tensor:
        """Values ``(rows, columns)`` of the codes as they ship."""

    def penalty(self, progress: float) -> Tensor | None:
        """A sum over the weights to be added to the loss in proportion; ``None``: nothing."""
        return None

    def project(self) -> None:
        """After each step, without gradients: the leaves' constraints, by default none."""
        return


class SignOffsets(LearnedCodes):
    """``round(position + V)`` with ``|V| <= bound``."""

    unit = 1.0  # with a linear decay, an offset moves at most 0.5

    def __init__(self, start: Start) -> None:
        self.start = start
        self.offset = torch.zeros_like(start.latent).requires_grad_()
        self.leaves = [self.offset]

    def values(self, qparams: QParams, progress: float, noise: torch.Generator) -> Tensor:
        """What ships, straight-through."""
        return self.chosen(qparams)

    def chosen(self, qparams: QParams) -> Tensor:
        """The latent weights moved by their offsets and rounded to nearest."""
        return self.start.format.fake_quant_shifted(self.start.latent, self.offset, qparams)

    def project(self) -> None:
        """The bound."""
        self.offset.clamp_(-self.start.bound, self.start.bound)


class SigmoidGates(LearnedCodes):
    """``lower + h(V)``, with AdaRound's stretch of the sigmoid and its annealed regulariser.

    Gates start where ``lower + h`` is the position, so that training starts at the latent weights; the code that
    ships is the nearer of the two.
    """

    unit = 10.0  # V is between -2.4 and 2.4 where h is between 0 and 1
    stretch: ClassVar[tuple[float, float]] = (-0.1, 1.1)
    warm_up: ClassVar[float] = 0.2  # share of the training without the regulariser
    betas: ClassVar[tuple[float, float]] = (20.0, 2.0)

    def __init__(self, start: Start) -> None:
        self.format = start.format
        (near, other), (distance, _) = start.neighbours()
        self.lower = torch.minimum(near, other)
        self.room = (other - near).abs()  # 0 where the format has no second code
        upper = near > self.lower
        share = distance.clamp(max=0.5 - FIRM)
        low, high = self.stretch
        gate = torch.where(upper, 1 - share, share)
        self.logit = ((gate - low) / (high - low)).logit().requires_grad_()
        self.leaves = [self.logit]

    def gates(self) -> Tensor:
        """``h(V)``, from 0 to 1."""
        low, high = self.stretch
        return (self.logit.sigmoid() * (high - low) + low).clamp(0, 1)

    def values(self, qparams: QParams, progress: float, noise: torch.Generator) -> Tensor:
        """Values between both codes."""
        return self.format.dequantize(self.lower + self.gates() * self.room, qparams)

    def chosen(self, qparams: QParams) -> Tensor:
        """The code on the gate's side."""
        return self.format.dequantize(self.lower + (self.gates() >= 0.5) * self.room, qparams)

    def penalty(self, progress: float) -> Tensor | None:
        """``sum 1 - |2 h - 1| ** beta``, behind the warm-up, with ``beta`` falling."""
        if progress < self.warm_up:
            return None
        first, last = self.betas
        beta = first + (last - first) * (progress - self.warm_up) / (1 - self.warm_up)
        return ((1 - (2 * self.gates() - 1).abs().pow(beta)) * self.room).sum()


class GumbelChoice(LearnedCodes):
    """A softmax over neighbouring codes, with noise, sharper and sharper.

    ``softmax((kappa l + g) / tau)`` of logits ``l`` with Gumbel noise ``g``; logits start at ``-distance ** 2`` times
    ``strength / 2``, and ``kappa`` and ``tau`` go from the first to the second of their values: those of GSQ's
    released configuration, with its first ``kappa`` as the unit of the logits.
    """

    unit = 6.0
    strength: ClassVar[float] = 6.0
    kappas: ClassVar[tuple[float, float]] = (1.0, 5.0)
    taus: ClassVar[tuple[float, float]] = (2.0, 0.05)

    def __init__(self, start: Start) -> None:
        self.format = start.format
        self.codes, distances = start.neighbours()
        closed = distances.isinf()
        self.closed = torch.zeros_like(distances).masked_fill_(closed, -torch.inf)
        logits = -self.strength / 2 * distances.masked_fill(closed, 0).square()
        logits[0] += FIRM
        self.logits = logits.requires_grad_()
        self.leaves = [self.logits]

    def values(self, qparams: QParams, progress: float, noise: torch.Generator) -> Tensor:
        """A mean of the codes' values."""
        kappa, tau = (first + (last - first) * progress for first, last in (self.kappas, self.taus))
        drawn = torch.empty_like(self.logits).exponential_(generator=noise).log_()  # minus Gumbel noise
        shares = ((kappa * self.logits - drawn + self.closed) / tau).softmax(0)
        parts = [
            share * self.format.dequantize(code, qparams) for share, code in zip(shares, self.codes, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def chosen(self, qparams: QParams) -> Tensor:
        """The code of the largest logit."""
        best = (self.logits + self.closed).argmax(0, keepdim=True)
        return self.format.dequantize(self.codes.gather(0, best)[0], qparams)


PARAMETRISATIONS: dict[str, type[LearnedCodes]] = {
    "sign": SignOffsets,
    "sigmoid": SigmoidGates,
    "gumbel": GumbelChoice,
}
