"""AffineQuant's options, in groups: where maps are learned, how, clipping, and what is minimized."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.errors import LowbitError
from lowbit.methods.options import check_bounds, check_choices


@dataclass(frozen=True)
class Sites:
    """Where maps are learned.

    Attributes:
        qkv: map after the norm before q, k and v: ``off``, ``diagonal``, or ``matrix``, which stays online.
        mlp: the same for the norm before the MLP.
        heads: map from v to o, one for each KV head.
        qk: map between q and k; under a rotary embedding ``matrix`` means scaled rotations.
        channels: map from up to down (fc1 to fc2): ``off`` or ``diagonal``.
        signs: flip signs first, so that a token's outliers lie on one side of zero; not in the papers.
        shift: also learn shifts where both ends of a site have a bias.
    """

    qkv: str = "diagonal"
    mlp: str = "diagonal"
    heads: str = "matrix"
    qk: str = "matrix"
    channels: str = "diagonal"
    signs: bool = True
    shift: bool = True

    def __post_init__(self) -> None:
        sizes = ("off", "diagonal", "matrix")
        choices = dict.fromkeys(("qkv", "mlp", "heads", "qk"), sizes) | {"channels": ("off", "diagonal")}
        check_choices("affinequant", self, choices)

    @property
    def matrix_behind_norm(self) -> bool:
        """A dense matrix behind a norm is asked for; it stays online."""
        return "matrix" in (self.qkv, self.mlp)


@dataclass(frozen=True)
class Maps:
    """How maps are parametrized and kept invertible.

    Attributes:
        parametrisation: of the matrices: ``masked``, ``lu``, ``blocks`` or ``svd``.
        block_size: of ``blocks``; where it does not divide a width, the next smaller number that does.
        mask: how the matrices open: ``gradual`` (the paper's), ``released`` (its code's), ``none``.
        stability: the factor on all entries off the diagonal.
        dominance: ``enforce`` keeps every matrix strictly diagonally dominant after each step, ``report`` records the
            margins, ``off`` leaves them out.
        condition: largest condition number of a map.
        precision: of the maps: ``float``, ``float-double`` (maps and merged weights in float64, the block in
            float32), ``double`` (all in float64).
        lr_maps: learning rate of maps and shifts. The paper's 5e-3 is for thousands of steps; a quick run has 80.
    """

    parametrisation: str = "masked"
    block_size: int = 16
    mask: str = "gradual"
    stability: float = 1.0
    dominance: str = "report"
    condition: float = 1e3
    precision: str = "float"
    lr_maps: float = 2e-2

    def __post_init__(self) -> None:
        choices = {
            "parametrisation": ("masked", "lu", "blocks", "svd"),
            "mask": ("gradual", "released", "none"),
            "dominance": ("enforce", "report", "off"),
            "precision": ("float", "double", "float-double"),
        }
        check_choices("affinequant", self, choices)
        if self.dominance == "enforce" and self.parametrisation not in ("masked", "blocks"):
            raise LowbitError(
                f"affinequant: dominance 'enforce' with parametrisation '{self.parametrisation}': it can be kept for "
                "masked and blocks only; take one of these, or dominance report"
            )
        bounds = {"stability": "0 or more", "condition": "above 1", "block_size": "1 or more", "lr_maps": "0 or more"}
        check_bounds("affinequant", self, bounds)


@dataclass(frozen=True)
class Clipping:
    """Learned clipping of ranges (OmniQuant).

    Attributes:
        clip: learn clipping ratios on the ends of every weight group's range.
        act_clip: learn clipping ratios on the tokens' ranges; no stock runtime has them, so they stay online.
        lr_clips: learning rate of the ratios' logits. The papers' 1e-2 is for thousands of steps.
    """

    clip: bool = True
    act_clip: bool = False
    lr_clips: float = 0.3

    def __post_init__(self) -> None:
        check_bounds("affinequant", self, {"lr_clips": "0 or more"})


@dataclass(frozen=True)
class Objective:
    """What is minimized, and from where.

    Attributes:
        loss: ``token`` divides each token's squared error by the mean square of its float output; with ``mse``, the
            papers', the few tokens with massive activations decide alone.
        aug_loss: weight of a second error, against the float block on the quantized input.
        start: ``smooth`` moves SmoothQuant's scale into the block first; ``given`` takes the block as it comes, for
            use behind a step such as ``awq`` that has moved scales itself.
        init_power: how much of the activations' outliers a smooth start moves into the weights.
    """

    loss: str = "token"
    aug_loss: float = 0.0
    start: str = "smooth"
    init_power: float = 0.5

    def __post_init__(self) -> None:
        check_choices("affinequant", self, {"loss": ("token", "mse"), "start": ("smooth", "given")})
        check_bounds("affinequant", self, {"aug_loss": "0 or more", "init_power": "from 0 to 1"})
