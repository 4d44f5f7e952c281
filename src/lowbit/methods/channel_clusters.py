"""Clusters of channels by their ranges: k-means over the points ``(min, max)``.

Source: RPTQ, Yuan et al., 2023, arXiv 2304.01089, section 4.2. The start is k-means++ (Arthur and Vassilvitskii,
2007) with a seed of its own: equal inputs give equal clusters, whatever the global seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 100  # of Lloyd's algorithm, which nearly always converges within 30


def cluster_ranges(low: Tensor, high: Tensor, count: int) -> Tensor:
    """The cluster of each channel ``(channels,)`` int64, at most ``count`` of them, from 0 without gaps.

    Clusters are numbered by the width of their mean range, the narrowest first.

    Args:
        low, high: the ends of each channel's range ``(channels,)``.
        count: clusters.

    >>> cluster_ranges(torch.tensor([-9.0, -1.0, -8.0, -1.1]), torch.tensor([9.0, 1.0, 8.0, 1.2]), 2).tolist()
    [1, 0, 1, 0]
    """
    points = torch.stack([low, high], 1).double().cpu()
    centres = _start(points, count)
    labels = torch.cdist(points, centres).argmin(1)
    for _ in range(STEPS):
        used = labels.unique()
        centres = torch.stack([points[labels == label].mean(0) for label in used])
        nearest = torch.cdist(points, centres).argmin(1)
        if torch.equal(used[nearest], labels):
            break
        labels = nearest
    _, labels = labels.unique(return_inverse=True)
    widths = torch.stack([(points[labels == label]).mean(0).diff()[0] for label in labels.unique()])
    return widths.argsort(stable=True).argsort()[labels]


def _start(points: Tensor, count: int) -> Tensor:
    """k-means++: each further centre is a point drawn with the square of its distance to the nearest one so far."""
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        weights = torch.cdist(points, centres).amin(1).square()
        if not bool(weights.sum() > 0):  # fewer different points than clusters
            break
        centres = torch.cat([centres, points[torch.multinomial(weights, 1, generator=generator)]])
    return centres


def reordered(labels: Tensor) -> tuple[Tensor, list[int]]:
    """The order ``(channels,)`` that brings clusters side by side, channels of one in the order that they had; sizes.

    >>> idx, sizes = reordered(torch.tensor([1, 0, 1, 0]))
    >>> idx.tolist(), sizes
    ([1, 3, 0, 2], [2, 2])
    """
    return labels.argsort(stable=True), labels.bincount().tolist()
