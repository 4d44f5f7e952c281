"""Options of the last step, end-to-end correction; ``pipeline/end_to_end.py`` has what it does and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lowbit.methods.options import check_bounds
from lowbit.methods.training import Schedule


@dataclass(frozen=True)
class Tune:
    """A merged correction of the whole model against the float model's next-token distributions.

    Attributes:
        rank: of each linear's pair ``B A``; merged, it costs nothing when running.
        ends: learn the ends of the weights' ranges, and with them scales and zeros.
        norms: learn the norms' gains.
        epochs, batch, held_out, grad_clip, decay: see ``learn.Schedule``; 0 epochs leave the step out.
        lr, lr_ends, lr_norms: learning rates of the pairs, of the ends' logarithms, of the gains.
        scale: let the learning rates fall with the root of what is lost at the start; see ``rate``.
        schedule: epochs, validation split and the like; 0 epochs leave the step out.
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
        """Forward passes that it costs: each block is run twice and differentiated once a step."""
        return 5 * self.schedule.epochs

    def learned(self, shapes: Iterable[tuple[int, int]]) -> int:
        """An upper bound on the numbers that are learned for linears ``(rows, columns)``, but for groups' ends.

        >>> Tune(rank=4).learned([(10, 20)])  # a pair of 4 x 30, and two ends of each row
        140
        """
        return sum(self.rank * (rows + columns) + 2 * rows for rows, columns in shapes)

    def rate(self, start: float) -> float:
        """The factor on the learning rates for a start that is ``start`` nats a token from the float model.

        Adam's steps have the length of the learning rate, however little there is to win. Near its least a divergence
        is quadratic in the parameters: steps half as long stray a quarter as far. Rates that go with the root of the
        start's divergence stray by the same share of it, whatever the scheme. From 1 nat upwards they stay as given.

        >>> Tune().rate(0.09), Tune().rate(4.0), Tune(scale=False).rate(0.09)
        (0.3, 1.0, 1.0)
        """
        return min(1.0, math.sqrt(max(start, 0.0))) if self.scale and math.isfinite(start) else 1.0
