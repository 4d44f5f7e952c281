"""Options of end-to-end tuning, the last step; ``pipeline/end_to_end.py`` implements it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lowbit.methods.options import check_bounds
from lowbit.methods.training import Schedule


@dataclass(frozen=True)
class Tune:
    """A merged low-rank correction of the whole model, trained on the float model's next-token distributions.

    Attributes:
        rank: rank of each linear's pair ``B A``; merged, it costs nothing at run time.
        ends: train both ends of the weights' ranges, which determine scales and zero points.
        norms: train the norms' gains.
        lr, lr_ends, lr_norms: learning rates of the pairs, of the ends' logarithms, of the gains.
        scale: scale the learning rates with the square root of the initial divergence; see ``rate``.
        schedule: epochs, batches, validation split, gradient clipping and learning-rate decay; with 0 epochs the step
            is skipped.
    """

    rank: int = 32
    ends: bool = True
    norms: bool = True
    lr: float = 5e-3
    lr_ends: float = 2e-3
    lr_norms: float = 2e-3
    scale: bool = True
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        rates = dict.fromkeys(("lr", "lr_ends", "lr_norms"), "0 or more")
        check_bounds("tune", self, {"rank": "1 or more", **rates})

    @property
    def passes(self) -> int:
        """Cost in forward passes: per step, each block runs twice and is differentiated once."""
        return 5 * self.schedule.epochs

    def parameter_count(self, shapes: Iterable[tuple[int, int]]) -> int:
        """An upper bound on the trained parameters for linears ``(rows, columns)``, without the ends of groups.

        >>> Tune(rank=4).parameter_count([(10, 20)])  # a pair of 4 x 30, and two ends of each row
        140
        """
        return sum(self.rank * (rows + columns) + 2 * rows for rows, columns in shapes)

    def rate(self, start: float) -> float:
        """Factor on the learning rates for an initial divergence of ``start`` nats per token from the float model.

        Adam's step length is the learning rate, however small the possible gain. Near its minimum a divergence is
        quadratic in the parameters: steps half as long raise it a quarter as much. With rates proportional to the
        square root of the initial divergence, this noise is a constant share of it, whatever the scheme. From 1 nat
        upwards the factor is 1.

        >>> Tune().rate(0.09), Tune().rate(4.0), Tune(scale=False).rate(0.09)
        (0.3, 1.0, 1.0)
        """
        return min(1.0, math.sqrt(max(start, 0.0))) if self.scale and math.isfinite(start) else 1.0
