"""Options of learned rounding, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowbit.errors import LowbitError
from lowbit.methods.gptq import GPTQ
from lowbit.methods.learned_codes import PARAMETRISATIONS
from lowbit.methods.method import Method
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.rtn import RTN

STARTS: dict[str, Callable[[], Method]] = {"nearest": RTN, "gptq": GPTQ}
CHOICES = {"parametrisation": tuple(PARAMETRISATIONS), "start": tuple(STARTS), "loss": ("token", "mse")}
MOMENTS = {"sign": 0, "sigmoid": 3, "gumbel": 1}  # tensors of the optimizer's state for each learned one


@dataclass(frozen=True)
class RoundingOptions:
    """What is learned, and from where.

    Attributes:
        parametrisation: ``sign``, ``sigmoid`` or ``gumbel``; see ``learned_codes.py``.
        start: the codes to start from: the ``nearest``, or those of ``gptq`` on the training sequences.
        bound: how far a code may be from its weight, in codes, beyond the half that rounding takes: 0.5 leaves the
            two neighbours, 1 three codes, 1.5 four. ``sigmoid`` takes 0.5 alone.
        scales: also learn the scales: ratios of both ends of a range with ``sign``, of the scale with the others; in
            formats other than integers, search them first (``searched_clips.py``).
        correct: share of the error of earlier blocks that the codes are to make up for, see ``rounding_fit.py``:
            with 1 the target is the float model's output, with 0 the float block's for the quantized hidden states.
        loss: ``token`` or ``mse``; see ``AffineQuant``.
        lr: learning rate of the codes: 1 is the parametrisation's own, 1 / steps for ``sign``.
        lr_scales: of the ratios, times the number of steps; AutoRound's is 1.
        regularization: weight of AdaRound's regulariser, a mean over the weights, in units of the start's loss.
    """

    parametrisation: str = "sign"
    start: str = "nearest"
    bound: float = 0.5
    scales: bool = True
    correct: float = 0.5
    loss: str = "token"
    lr: float = 1.0
    lr_scales: float = 2.0
    regularization: float = 1.0

    def __post_init__(self) -> None:
        check_choices("rounding", self, CHOICES)
        rates = dict.fromkeys(("lr", "lr_scales", "regularization"), "0 or more")
        check_bounds("rounding", self, {"bound": "above 0", "correct": "from 0 to 1", **rates})
        if self.parametrisation == "sigmoid" and self.bound != 0.5:
            raise LowbitError(
                f"rounding.bound {self.bound:g} given; sigmoid decides between two codes: set 0.5, or another "
                "rounding.parametrisation"
            )

    @property
    def copies(self) -> int:
        """Float32 values that are held for each weight: leaves with gradients, best values and moments, and others.

        >>> RoundingOptions().copies, RoundingOptions(parametrisation="gumbel").copies
        (8, 15)
        """
        leaves = round(2 * self.bound) + 1 if self.parametrisation == "gumbel" else 1
        return 5 + leaves * (3 + 2 * MOMENTS[self.parametrisation])
