"""Estimators of the range of a static input, from counts of the values that calibration sees.

``min-max`` covers every value, and one massive token may decide it. A percentile leaves out the same share of values
at either end. ``mse`` takes the range with the least mean squared error of the quantized values, clipped ones
included: it gives up a massive value only where the precision of all others is worth more.

Values are counted by the upper 16 bits of their float32 pattern: sign, exponent and seven bits of mantissa. A count
takes the same memory for any number of tokens, its relative resolution is 2^-7, and counts of parts add up exactly in
any order. The ends themselves are kept exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.static_activations import StaticActs

BINS = 1 << 16
SHRINK, STEPS = 0.94, 64  # the search tries ends down to SHRINK ** (STEPS - 1), a fiftieth, of the observed ones
SWEEPS = 2  # over the ends of a range that are independent of each other
ALLOWED = "min-max, mse, or a percentile from above 50 to below 100, such as 99.99"


@dataclass
class ValueCounts:
    """Counts of the values of a tensor, part by part.

    Attributes:
        counts: int64 ``(65536,)``, by the upper half of a value's pattern.
        low, high: the smallest and the largest value, 0 included, float32 ``(1,)``.

    >>> seen = ValueCounts()
    >>> seen.add(torch.tensor([[1.0, -2.0], [1.0, 0.25]]))
    >>> values, counts = seen.values()
    >>> values.tolist(), counts.tolist()
    ([-2.0, 0.2509765625, 1.0], [1, 1, 2])
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    low: Tensor = field(default_factory=lambda: torch.zeros(1))
    high: Tensor = field(default_factory=lambda: torch.zeros(1))

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor of any shape and dtype."""
        values = x.detach().float().flatten()
        low, high = (end.reshape(1).cpu() for end in torch.aminmax(values))
        if not bool(low.isfinite() & high.isfinite()):
            raise LowbitError("the input of a linear is NaN or infinite in calibration; check the model")
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        bins = values.contiguous().view(torch.int32).bitwise_right_shift(16).bitwise_and(BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS).cpu()

    def merge(self, counts: Tensor, low: Tensor, high: Tensor) -> None:
        """Add the counts of other values."""
        self.counts = self.counts + counts
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def values(self) -> tuple[Tensor, Tensor]:
        """The middles of the bins that hold values, ascending float32, and their counts."""
        bins = self.counts.nonzero().flatten()
        pattern = (bins << 16) | (1 << 15)
        signed = torch.where(pattern >= 1 << 31, pattern - (1 << 32), pattern).to(torch.int32)
        middles, order = torch.sort(signed.view(torch.float32))
        return middles.clamp(self.low, self.high), self.counts[bins[order]]


@dataclass
class ClusterCounts:
    """Counts of the values of clusters of consecutive channels, each as ``ValueCounts``.

    Attributes:
        sizes: channels of each cluster.
        parts: the counts of each.
    """

    sizes: Sequence[int]
    parts: list[ValueCounts] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = [ValueCounts() for _ in self.sizes]

    def add(self, x: Tensor) -> None:
        """Count the values of ``(..., width)``."""
        for part, values in zip(self.parts, x.split(list(self.sizes), -1), strict=True):
            part.add(values)


@dataclass(frozen=True)
class RangeEstimator:
    """How a static range follows from the values seen.

    Attributes:
        kind: ``min-max``, ``mse`` or ``percentile``.
        percentile: per cent of the values below the upper end, and above the lower one; for ``percentile`` only.
    """

    kind: Literal["min-max", "mse", "percentile"] = "mse"
    percentile: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """``min-max``, ``mse`` or a percentile.

        >>> RangeEstimator.parse("99.99").name, RangeEstimator.parse("min-max").kind
        ('99.99', 'min-max')
        """
        word = text.strip().lower()
        if word == "min-max":
            return cls("min-max")
        if word == "mse":
            return cls("mse")
        try:
            percentile = float(word)
        except ValueError:
            percentile = 0.0
        if not 50 < percentile < 100:
            raise LowbitError(f"--input-range {text} given; allowed: {ALLOWED}")
        return cls("percentile", percentile)

    @property
    def name(self) -> str:
        """The inverse of ``parse``."""
        return self.kind if self.percentile is None else f"{self.percentile:g}"

    def range(self, seen: ValueCounts, format: StaticActs) -> tuple[Tensor, Tensor]:
        """Ends of the range, 0 included, float32 ``(1,)`` each.

        A format with scales of its own for groups has nothing to gain from clipping all of them: for it, ``mse`` is
        ``min-max``.
        """
        if self.kind == "percentile":
            assert self.percentile is not None
            return _percentile(seen, self.percentile / 100)
        if self.kind == "mse" and format.learns_range:
            return _least_error(seen, format)
        return seen.low, seen.high

    def of_clusters(self, seen: ClusterCounts, format: StaticActs) -> tuple[Tensor, Tensor, float]:
        """Ends of the clusters' ranges, float32 ``(width,)`` each, and the share of values outside.

        >>> from lowbit.quant.static_activations import StaticInt
        >>> seen = ClusterCounts([2, 1])
        >>> seen.add(torch.tensor([[1.0, 2.0, -9.0], [0.5, 0.0, 3.0]]))
        >>> low, high, clipped = RangeEstimator("min-max").of_clusters(seen, StaticInt(8, symmetric=False))
        >>> low.tolist(), high.tolist(), clipped
        ([0.0, 0.0, -9.0], [2.0, 2.0, 3.0], 0.0)
        """
        ranges = [self.range(part, format) for part in seen.parts]
        shares = [
            clipped_share(part, *found) * size
            for part, found, size in zip(seen.parts, ranges, seen.sizes, strict=True)
        ]
        low, high = (torch.cat([found[end] for found in ranges]) for end in (0, 1))
        sizes = torch.tensor(list(seen.sizes))
        return low.repeat_interleave(sizes), high.repeat_interleave(sizes), sum(shares) / sum(seen.sizes)


MSE = RangeEstimator()


def clipped_share(seen: ValueCounts, low: Tensor, high: Tensor) -> float:
    """The share of values outside a range, up to the resolution of the counts."""
    values, counts = seen.values()
    outside = (values < low) | (values > high)
    return float(counts[outside].sum()) / max(int(counts.sum()), 1)


def _percentile(seen: ValueCounts, share: float) -> tuple[Tensor, Tensor]:
    """The values that ``share`` of all values do not exceed, from either side.

    >>> seen = ValueCounts()
    >>> seen.add(torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([900.0])]))
    >>> [round(float(end), 2) for end in _percentile(seen, 0.9999)]
    [-1.0, 1.0]
    """
    values, counts = seen.values()
    below = counts.cumsum(0).double() / counts.sum()
    above = counts.flip(0).cumsum(0).double() / counts.sum()
    high = values[int(torch.searchsorted(below, share).clamp(max=len(values) - 1))]
    low = values.flip(0)[int(torch.searchsorted(above, share).clamp(max=len(values) - 1))]
    return low.clamp(max=0).reshape(1), high.clamp(min=0).reshape(1)


def _least_error(seen: ValueCounts, format: StaticActs) -> tuple[Tensor, Tensor]:
    """The range with the least mean squared error: both ends shrunk together, then each in turn."""
    values, counts = seen.values()
    weights = counts.double()

    def error(low: Tensor, high: Tensor) -> float:
        rounded = format.on_qparams(values, format.qparams(low, high))
        return float((weights * (rounded - values).double().square()).sum())

    def best(ends: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        errors = [error(*pair) for pair in ends]
        return ends[errors.index(min(errors))]

    factors = [SHRINK**step for step in range(STEPS)]
    low, high = best([(seen.low * factor, seen.high * factor) for factor in factors])
    for _ in range(SWEEPS if format.independent_ends else 0):
        low, high = best([(low, high), *((low, seen.high * factor) for factor in factors)])
        low, high = best([(low, high), *((seen.low * factor, high) for factor in factors)])
    return low, high
