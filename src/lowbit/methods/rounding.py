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

from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.rounding_fit import RoundingFit
from lowbit.methods.rounding_options import STARTS, RoundingOptions
from lowbit.methods.training import Schedule, fit
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat


@dataclass(frozen=True)
class Rounding(Method):
    """Learned codes; recipes use the option names without their group.

    Attributes:
        options: what is learned, and from where; see ``RoundingOptions``.
        schedule: epochs, batches, validation split and learning-rate decay.
    """

    options: RoundingOptions = RoundingOptions()
    # All epochs run: steps of one length wander until it falls, and the validation loss falls most at the end.
    schedule: Schedule = Schedule(epochs=16, decay="linear", patience=0)
    rounds: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "x_q"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = False

    @property
    def passes(self) -> int:
        """Those of the start and of the target, then forward and backward in each epoch."""
        target = int(self.options.correct < 1)
        return STARTS[self.options.start]().passes + 1 + target + 4 * self.schedule.epochs

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: only codes and scales change."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """Codes for every linear that has a format; all layers of a window are learned together."""
        if not block.formats:
            return block
        trainer = RoundingFit(self.options, self.schedule, block, calib)
        fitted = fit(
            trainer.groups(),
            trainer.loss,
            len(calib.x_q),
            self.schedule,
            block.start,
            trainer.begin,
            trainer.project,
            ahead=trainer.rows.prepare,
            share=trainer.rows.share,
            optimizer=trainer.optimizer,
        )
        return trainer.fold(fitted)
