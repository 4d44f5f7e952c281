"""AffineQuant: equivalent affine maps and clipping ratios, learned by matching the quantized block to the float one.

Source: Ma et al., ICLR 2024, arXiv 2403.12544. For each block, in order, gradient descent on

    ``mean (block_q(x_q; A, s, clips) - block(x_fp))**2``   (equation 4)

over maps ``A`` and shifts ``s`` at the sites of ``sites.py`` and over the weights' clipping ratios. The function that
training uses also folds the maps. With diagonals only this is OmniQuant (Shao et al., ICLR 2024, arXiv 2308.13137),
the source of the learnable weight clipping.

Differences from the papers:

* Maps start at the identity, on a block into which SmoothQuant's scale is folded: one learning rate suits all.
* Diagonals are ``exp(s)``: positive and bounded. Sign flips are chosen beforehand, for inputs that are quantized with
  a zero point (``signs.py``), because no gradient leads from one sign to the other.
* q and k with a rotary embedding take scaled rotations of its pairs, the maps that commute with it. The released
  implementations train maps there that change the function.
* up -> down takes a diagonal; both papers omit this site.
* The condition number bounds the inverse. Strict diagonal dominance is measured, and enforced on request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affine_options import Clipping, Maps, Objective, Sites
from lowbit.methods.layer_by_layer import layer_by_layer
from lowbit.methods.learned_mix import OPS
from lowbit.methods.method import Method, Needs
from lowbit.methods.options import check_bounds, with_options
from lowbit.methods.training import Schedule, fit
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import Clip, Matrix, RuntimeOp
from lowbit.quant.activations import ActFormat


@dataclass(frozen=True)
class AffineQuant(Method):
    """Learned equivalent maps and clipping ratios; recipes use the option names without their group.

    Attributes:
        sites, maps, clipping, objective: option groups; see their classes.
        schedule: epochs, batches, validation split and learning-rate decay.
        window: consecutive layers that are trained together, where the recipe's window has more.
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
        """Two for the starting point, then forward and backward in each epoch."""
        return 2 + 4 * self.schedule.epochs

    def reads_quantized(self, inputs: ActFormat | None) -> bool:
        """Unless blocks are trained on the float model's hidden states."""
        return self.objective.inputs == "quantized"

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """Matrices after norms, mixed and clipped inputs, where the options select them."""
        ops: set[type[RuntimeOp]] = set()
        if self.sites.matrix_behind_norm:
            ops.add(Matrix)
        ops |= {OPS[choice] for choice in self.sites.mixes}
        if self.clipping.act_clip and inputs is not None and inputs.clippable:
            ops.add(Clip)
        return frozenset(ops)

    def folded(self) -> Self:
        """Diagonals where matrices behind norms, or mixes, would stay online; inputs are not clipped."""
        sites = {site: self.sites.folded(site) for site in ("qkv", "mlp", "heads", "channels")}
        for norm in ("qkv", "mlp"):
            sites[norm] = "diagonal" if sites[norm] == "matrix" else sites[norm]
        return with_options(self, **sites, act_clip=False)

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with maps folded and clipping ratios set; its float function is unchanged."""
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
            # The seed depends on the position only, so that a resumed run equals an uninterrupted one.
            block.start,
            trainer.begin,
            trainer.project,
            trainer.end,
            ahead=trainer.rows.prepare,
            share=trainer.rows.share,
        )
        return trainer.fold(fitted)
