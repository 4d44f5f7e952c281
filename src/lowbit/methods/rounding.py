"""Learned rounding: codes, scales and clips of a block chosen by gradient descent on the block's output error.

A weight's code is one of the two next to it (or more, see ``bound``); which one, the block's output decides, on the
hidden states of the model that is quantized up to here. The parametrisations and their sources are in
``learned_codes.py``. With ``sign``, the default, this is SignRound as AutoRound has it:

    ``round(W / s + V) s``,  ``|V| <= 0.5``,  ``s`` from the range with learned ratios of both ends,

with steps along the sign of the gradient whose length falls linearly. What is measured, and compared with the start,
are the codes that ship. Differences from the papers:

* The loss is relative for each token, as in the other methods here, so that a few tokens do not dominate.
* The best epoch on validation sequences is kept, not the best step on the training batches; the start counts.
* Learning may start at GPTQ's codes in place of the nearest ones: at latent weights within the cells of those codes.
* Any format: offsets, gates and choices are in units of codes, which every format has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowbit.errors import LowbitError
from lowbit.methods.learned_codes import PARAMETRISATIONS
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.rounding_fit import STARTS, RoundingFit
from lowbit.methods.training import Schedule, fit
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat

CHOICES = {"parametrisation": tuple(PARAMETRISATIONS), "start": tuple(STARTS), "loss": ("token", "mse")}


@dataclass(frozen=True)
class Rounding(Method):
    """Learned codes.

    Attributes:
        parametrisation: ``sign``, ``sigmoid`` or ``gumbel``; see ``learned_codes.py``.
        start: the codes to start from: the ``nearest``, or those of ``gptq`` on the training sequences.
        bound: how far a code may be from its weight, in codes, beyond the half that rounding takes: 0.5 leaves the
            two neighbours, 1 three codes, 1.5 four. ``sigmoid`` takes 0.5 alone.
        scales: also learn the scales: ratios of both ends of a range with ``sign``, of the scale with the others; in
            formats other than integers, search them first (``searched_clips.py``).
        loss: ``token`` or ``mse``; see ``AffineQuant``.
        lr: learning rate of the codes: 1 is the parametrisation's own, 1 / steps for ``sign``.
        lr_scales: of the ratios, times the number of steps.
        regularization: weight of AdaRound's regulariser, a mean over the weights, in units of the start's loss.
        schedule: epochs, batches, validation split and learning-rate decay.
    """

    parametrisation: str = "sign"
    start: str = "nearest"
    bound: float = 0.5
    scales: bool = True
    loss: str = "token"
    lr: float = 1.0
    lr_scales: float = 1.0
    regularization: float = 1.0
    schedule: Schedule = Schedule(epochs=30, decay="linear")
    rounds: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "x_q"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choices("rounding", self, CHOICES)
        rates = dict.fromkeys(("lr", "lr_scales", "regularization"), "0 or more")
        check_bounds("rounding", self, {"bound": "above 0", **rates})
        if self.parametrisation == "sigmoid" and self.bound != 0.5:
            raise LowbitError(
                f"rounding.bound {self.bound:g} given; sigmoid decides between two codes: set 0.5, or another "
                "rounding.parametrisation"
            )

    @property
    def passes(self) -> int:
        """Those of the start, then forward and backward in each epoch."""
        return STARTS[self.start]().passes + 1 + 4 * self.schedule.epochs

    @property
    def copies(self) -> int:
        """Float32 values that are held for each weight: leaves with gradients, best values and moments, and others.

        >>> Rounding().copies, Rounding(parametrisation="gumbel").copies
        (8, 15)
        """
        leaves = round(2 * self.bound) + 1 if self.parametrisation == "gumbel" else 1
        moments = {"sign": 0, "sigmoid": 3, "gumbel": 1}[self.parametrisation]
        return 5 + leaves * (3 + 2 * moments)

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: only codes and scales change."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """Codes for every linear that has a format; all layers of a window are learned together."""
        if not block.formats:
            return block
        trainer = RoundingFit(self, block, calib)
        fitted = fit(
            trainer.groups(),
            trainer.loss,
            len(calib.x_q),
            self.schedule,
            block.start,
            trainer.begin,
            trainer.project,
            ahead=trainer.rows.prepare,
            optimizer=trainer.optimizer,
        )
        return trainer.fold(fitted)
