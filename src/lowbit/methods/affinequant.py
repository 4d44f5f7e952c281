"""AffineQuant: equivalent affine maps and clipping, learned so that the rounded block still matches the float one.

Source: Ma et al., ICLR 2024, arXiv 2403.12544. For each block, in order, gradient descent on

    ``mean (block_q(x_q; A, s, clips) - block(x_fp))**2``   (equation 4)

over maps ``A`` and shifts ``s`` at the sites of ``sites.py`` and over the factors that clip the weights' ranges. The
maps are merged by the code that trained them. With diagonals only this is OmniQuant (Shao et al., ICLR 2024, arXiv
2308.13137), whose learnable weight clipping it takes over.

Departures, with reasons:

* Maps start at the identity on a block that has SmoothQuant's scale merged already, so one learning rate suits them.
* Diagonals are ``exp(s)``: positive and bounded. Their signs are chosen before, where inputs are rounded with a zero
  point (``signs.py``): no gradient leads from one to the other.
* q and k under a rotary embedding take scaled rotations of its pairs, the maps that commute with it. The released
  codes train maps there that change the function.
* up -> down takes a diagonal; both papers leave this site out.
* What bounds the inverse is the condition number. Strict diagonal dominance is measured, and kept where asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affine_options import Clipping, Maps, Objective, Sites
from lowbit.methods.layer_by_layer import layer_by_layer
from lowbit.methods.method import Method, Needs
from lowbit.methods.options import check_bounds
from lowbit.methods.training import Schedule, fit
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import Clip, Matrix, RuntimeOp
from lowbit.quant.activations import ActFormat


@dataclass(frozen=True)
class AffineQuant(Method):
    """Learned equivalent maps and clipping; options go by their own names in recipes, without that of their group.

    Attributes:
        sites, maps, clipping, objective: see these.
        schedule: epochs, validation split and the like.
        window: consecutive layers that are fitted together, where the recipe's window has more.
    """

    sites: Sites = Sites()
    maps: Maps = Maps()
    clipping: Clipping = Clipping()
    objective: Objective = Objective()
    schedule: Schedule = Schedule()
    window: int = 1
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True
    needs: ClassVar[Needs] = "both"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bounds("affinequant", self, {"window": "1 or more"})

    @property
    def passes(self) -> int:
        """One for the start, then forward and backward in each epoch."""
        return 2 + 4 * self.schedule.epochs

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """Matrices behind norms and clipped inputs, where they are asked for."""
        ops: set[type[RuntimeOp]] = set()
        if self.sites.matrix_behind_norm:
            ops.add(Matrix)
        if self.clipping.act_clip and inputs is not None and inputs.clippable:
            ops.add(Clip)
        return frozenset(ops)

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with maps merged and clips chosen; its float function is unchanged."""
        if not block.formats:
            return block
        if len(block.layers) > self.window:
            return layer_by_layer(self, block, calib, self.window)
        trainer = AffineFit(self.sites, self.maps, self.clipping, self.objective, self.schedule, block, calib)
        fitted = fit(
            trainer.groups(),
            trainer.loss,
            len(calib.x_q),
            self.schedule,
            # Blocks draw differently, and a run that was resumed as one that was not.
            block.start,
            trainer.begin,
            trainer.project,
            ahead=trainer.rows.prepare,
        )
        return trainer.merged(fitted)
