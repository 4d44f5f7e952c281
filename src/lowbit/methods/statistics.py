"""What methods measure on calibration data: sums over tokens, gathered while a block runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.models.block import Block, observe
from lowbit.quant.scheme import Scheme


@dataclass
class Moments:
    """Sums over tokens of a linear's input ``x`` ``(tokens, in)``; only what is wanted is gathered.

    Attributes:
        gram: ``sum x x^T`` ``(in, in)``.
        even_gram: the same of ``x / rms(x)``: every token counts alike, where in ``gram`` a few with massive
            activations can outweigh all others.
        magnitude: ``sum |x|`` ``(in,)``.
        peak: ``max |x|`` ``(in,)``.
        crest: ``sum (|x| / rms(x))^8`` ``(in,)``: how often, and how far, a channel stands out in its token. The
            eighth root of the mean lies between a mean and a maximum, and no single token decides it.
        tokens: how many.

    All but ``peak`` are sums, so that several processes can each hold a share.
    """

    want: tuple[str, ...]
    gram: Tensor = field(default_factory=lambda: torch.zeros(()))
    even_gram: Tensor = field(default_factory=lambda: torch.zeros(()))
    magnitude: Tensor = field(default_factory=lambda: torch.zeros(()))
    crest: Tensor = field(default_factory=lambda: torch.zeros(()))
    peak: Tensor = field(default_factory=lambda: torch.zeros(()))
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Count ``x`` ``(..., in)`` in, in float32 whatever the block runs in."""
        rows = x.detach().flatten(0, -2).float()
        if "gram" in self.want:
            self.gram = _added(self.gram, rows.T @ rows)
        if "magnitude" in self.want:
            self.magnitude = self.magnitude + rows.abs().sum(0)
        if "peak" in self.want:
            self.peak = torch.maximum(self.peak.to(rows.device), rows.abs().amax(0))
        if "even_gram" in self.want or "crest" in self.want:
            even = rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
            if "even_gram" in self.want:
                self.even_gram = _added(self.even_gram, even.T @ even)
            if "crest" in self.want:
                self.crest = self.crest + even.pow(8).sum(0)
        self.tokens += rows.shape[0]


def _added(total: Tensor, part: Tensor) -> Tensor:
    """``total + part`` in the place of ``total``, which is a scalar 0 at first: no third matrix is made."""
    return part if total.ndim == 0 else total.add_(part)


def input_moments(
    block: Block,
    x: Tensor,
    linears: Iterable[str],
    want: tuple[str, ...],
    params: Mapping[str, Tensor] | None = None,
    scheme: Scheme | None = None,
    batch: int = 4,
) -> dict[str, Moments]:
    """Moments of the named linears' inputs while ``block`` runs over ``x``; see ``block.run`` for the rest.

    ``want`` names what to gather: fields of ``Moments``.
    """
    moments = {name: Moments(want) for name in linears}
    observe(block, x, {name: m.add for name, m in moments.items()}, params, scheme, batch)
    return moments
