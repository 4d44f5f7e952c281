"""The expected divergence of a weight in a format: its rounding errors, each weighted with the weight's curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.analysis.curvature import Curved
from lowbit.quant.format import Format
from lowbit.quant.scale_search import search_scales

HEAVY, LIGHT = 64, 64  # rows: those that count most, and about as many of the others


def expected_loss(curved: Curved, format: Format | None, searched: bool = True) -> float:
    """``1/2 sum_ij curvature_ij (Q(W)_ij - W_ij)^2``, nats per token; ``None``, float, costs nothing.

    The rows with the largest ``sum_j curvature_ij W_ij^2`` are quantized, and an even sample of the others in place
    of all, since rows are quantized independently.

    Args:
        curved: the weight and its curvature.
        format: the format.
        searched: scales are searched, as GPTQ and RTN do with ``search``, columns weighted with their curvature.

    Two weights of curvature 4 that a step of 1 moves by 0.25 each:

    >>> from lowbit.quant.integer import IntFormat
    >>> weight, curvature = torch.tensor([[-7.5, 0.25, 0.25]]), torch.tensor([[0.0, 4.0, 4.0]])
    >>> expected_loss(Curved("q", weight, curvature), IntFormat(4), searched=False)
    0.25
    """
    if format is None:
        return 0.0
    rows, factor = sampled(curved)
    weight, curvature = curved.weight[rows], curved.curvature[rows]
    qparams = format.qparams(weight)
    if searched:
        qparams = search_scales(weight, format, qparams, curvature.mean(0))
    errors = (format.fake_quant(weight, qparams) - weight).square()
    return 0.5 * float(((errors * curvature).double().sum(1) * factor).sum())


def sampled(curved: Curved) -> tuple[Tensor, Tensor]:
    """Rows that stand for all, and how many each stands for.

    >>> rows, factor = sampled(Curved("q", torch.ones(1000, 2), torch.ones(1000, 2)))
    >>> len(rows), float(factor.sum())
    (127, 1000.0)
    """
    count = len(curved.weight)
    order = (curved.curvature * curved.weight.square()).sum(1).argsort(descending=True, stable=True)
    heavy, light = order[:HEAVY], order[HEAVY:].sort().values
    if len(light) <= LIGHT:
        return order, torch.ones(count, dtype=torch.float64, device=order.device)
    kept = light[:: -(-len(light) // LIGHT)]
    factor = torch.ones(len(heavy) + len(kept), dtype=torch.float64, device=order.device)
    factor[len(heavy) :] = len(light) / len(kept)
    return torch.cat([heavy, kept]), factor
