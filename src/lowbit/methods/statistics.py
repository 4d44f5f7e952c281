"""What methods measure on calibration data: sums over tokens, gathered while a block runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.block import Block, run_all
from lowbit.scheme import Scheme


@dataclass
class Moments:
    """Sums over tokens of a linear's input ``x`` ``(tokens, in)``.

    Attributes:
        gram: ``sum x x^T`` ``(in, in)``.
        magnitude: ``sum |x|`` ``(in,)``.
        peak: ``max |x|`` ``(in,)``.
        tokens: how many.

    All but ``peak`` are sums, so that several processes can each hold a share.
    """

    want_gram: bool = True
    gram: Tensor = field(default_factory=lambda: torch.zeros(()))
    magnitude: Tensor = field(default_factory=lambda: torch.zeros(()))
    peak: Tensor = field(default_factory=lambda: torch.zeros(()))
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Count ``x`` ``(..., in)`` in."""
        rows = x.detach().flatten(0, -2)
        if self.want_gram:
            self.gram = self.gram + rows.T @ rows
        self.magnitude = self.magnitude + rows.abs().sum(0)
        self.peak = torch.maximum(self.peak, rows.abs().amax(0))
        self.tokens += rows.shape[0]


def input_moments(
    block: Block,
    x: Tensor,
    linears: Iterable[str],
    params: Mapping[str, Tensor] | None = None,
    scheme: Scheme | None = None,
    want_gram: bool = True,
    batch: int = 4,
) -> dict[str, Moments]:
    """Moments of the named linears' inputs while ``block`` runs over ``x``; see ``block.run`` for the rest."""
    moments = {name: Moments(want_gram) for name in linears}
    run_all(block, x, params, scheme, {name: m.add for name, m in moments.items()}, batch)
    return moments
