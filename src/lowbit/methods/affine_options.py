"""AffineQuant's options, grouped: sites, parametrization of the maps, clipping, objective."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.errors import LowbitError
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.smooth_start import PEAKS

MIXES = ("hadamard", "kronecker", "blocks", "hadamard-matrix")
"""Mixes of a linear's input that stay online, behind a map that folds; see ``learned_mix.py``."""


@dataclass(frozen=True)
class Sites:
    """Where maps are learned.

    ``qkv``, ``heads``, ``mlp`` and ``channels`` also take ``hadamard``, ``kronecker``, ``blocks`` and
    ``hadamard-matrix``: all channels that the linears there read are mixed, which stays online, behind what folds
    (the diagonal, at ``heads`` the matrices).

    Attributes:
        qkv: map between the norm and q, k, v: ``off``, ``diagonal``, or ``matrix``, which stays online.
        mlp: the same between the norm and the MLP.
        heads: map from v to o, one per KV head: ``off``, ``diagonal`` or ``matrix``; mixes are across heads.
        qk: map between q and k; with a rotary embedding, ``matrix`` means scaled rotations.
        channels: map from up to down (fc1 to fc2): ``off`` or ``diagonal``.
        signs: apply per-channel sign flips before training (``signs.py``); not in the papers.
        shift: also learn shifts at sites where both ends have a bias.
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
        choices = dict.fromkeys(("qkv", "mlp", "heads"), (*sizes, *MIXES)) | {"qk": sizes}
        check_choices("affinequant", self, choices | {"channels": ("off", "diagonal", *MIXES)})

    @property
    def matrix_behind_norm(self) -> bool:
        """Whether a dense matrix after a norm is selected; it stays online."""
        return "matrix" in (self.qkv, self.mlp)

    @property
    def mixes(self) -> frozenset[str]:
        """The kinds of mixes that are selected; they stay online."""
        return frozenset((self.qkv, self.heads, self.mlp, self.channels)) & frozenset(MIXES)

    def folded(self, site: str) -> str:
        """The map that folds at a site: ``off``, ``diagonal`` or ``matrix``.

        >>> Sites(mlp="kronecker", heads="hadamard").folded("mlp"), Sites(heads="hadamard").folded("heads")
        ('diagonal', 'matrix')
        """
        choice: str = getattr(self, site)
        if choice in MIXES:
            return "matrix" if site == "heads" else "diagonal"
        return choice


@dataclass(frozen=True)
class Maps:
    """Parametrization and conditioning of the maps.

    Attributes:
        parametrisation: of matrices: ``masked``, ``lu``, ``blocks`` or ``svd``; see ``maps.py``.
        mixing: of the factors of ``kronecker`` and of ``blocks``, where a site is mixed: ``svd``, ``masked`` or
            ``lu``. The parametrisation of ``hadamard-matrix`` is that of matrices.
        block_size: of ``blocks``; replaced by the largest smaller divisor where it does not divide the width. Where
            ``blocks`` mix a site whose weights have smaller groups, blocks are those groups.
        block: width of ``masked`` and ``blocks`` matrices where the linears that read them are quantized in groups:
            ``head``: that of a head, or of a norm; ``group``: block-diagonal, a block for each group, so that values
            are mixed only with those that share their scale. Sites whose width is no multiple of the group keep
            ``head``.
        mask: schedule of the gradual mask: ``gradual`` (the paper's), ``released`` (its code's) or ``none``.
        stability: factor on all off-diagonal entries.
        dominance: ``enforce`` keeps every matrix strictly diagonally dominant after each step; ``report`` records the
            margins; ``off`` omits them.
        condition: upper bound on the condition number of a map.
        precision: ``float``: float32; ``float-double``: maps, their inverses and the folding of weights in float64;
            ``double``: the block's forward and backward pass in float64 too. Quantizers see the folded weights in
            float32 in all three, as they are stored: codes chosen from float64 weights would not be those that ship.
        lr_maps: learning rate of maps and shifts. The paper's 5e-3 assumes thousands of steps; a quick run has 80.
    """

    parametrisation: str = "masked"
    mixing: str = "svd"
    block_size: int = 16
    block: str = "head"
    mask: str = "gradual"
    stability: float = 1.0
    dominance: str = "report"
    condition: float = 1e3
    precision: str = "float"
    lr_maps: float = 2e-2

    def __post_init__(self) -> None:
        choices = {
            "parametrisation": ("masked", "lu", "blocks", "svd"),
            "mixing": ("svd", "masked", "lu"),
            "block": ("head", "group"),
            "mask": ("gradual", "released", "none"),
            "dominance": ("enforce", "report", "off"),
            "precision": ("float", "double", "float-double"),
        }
        check_choices("affinequant", self, choices)
        if self.dominance == "enforce" and self.parametrisation not in ("masked", "blocks"):
            raise LowbitError(
                f"affinequant: dominance 'enforce' with parametrisation '{self.parametrisation}' given; it applies "
                "to 'masked' and 'blocks' only: choose one of these, or dominance 'report'"
            )
        if self.block == "group" and self.parametrisation not in ("masked", "blocks"):
            raise LowbitError(
                f"affinequant: block 'group' with parametrisation '{self.parametrisation}' given; it applies to "
                "'masked' and 'blocks' only: choose one of these, or block 'head'"
            )
        bounds = {"stability": "0 or more", "condition": "above 1", "block_size": "1 or more", "lr_maps": "0 or more"}
        check_bounds("affinequant", self, bounds)


@dataclass(frozen=True)
class Clipping:
    """Learned clipping ratios (OmniQuant).

    Attributes:
        clip: learn clipping ratios for both ends of every weight group's range, and of every static input's. Those of
            formats other than integers are searched (``searched_clips.py``).
        act_clip: learn clipping ratios for the activations' per-token ranges; they stay online, and no stock runtime
            supports them.
        lr_clips: learning rate of the ratios' logits. The papers' 1e-2 assumes thousands of steps.
    """

    clip: bool = True
    act_clip: bool = False
    lr_clips: float = 0.3

    def __post_init__(self) -> None:
        check_bounds("affinequant", self, {"lr_clips": "0 or more"})


@dataclass(frozen=True)
class Objective:
    """Training objective and starting point.

    Attributes:
        inputs: hidden states before the block while it is trained: ``quantized``, those of the model quantized so
            far, or the ``float`` model's, so that no block depends on another's fit.
        loss: ``token`` divides each token's squared error by the mean square of its float output; ``mse``, the
            papers' loss, is dominated by the few tokens with massive activations.
        aug_loss: weight of a second term, the error against the float block's output on the quantized input.
        start: ``smooth`` folds SmoothQuant's scale into the block first; ``given`` starts from the block as it is,
            for use after a step such as ``awq`` that folds scales itself.
        init_power: migration strength of the ``smooth`` start (SmoothQuant's ``alpha``).
        init_peaks: what the ``smooth`` start takes for a channel's size: ``relative``, how far it stands out in its
            tokens, or ``absolute``, its largest value (the papers'), which one massive token can decide; see
            ``smooth_start.py``.
    """

    inputs: str = "quantized"
    loss: str = "token"
    aug_loss: float = 0.0
    start: str = "smooth"
    init_power: float = 0.5
    init_peaks: str = "relative"

    def __post_init__(self) -> None:
        choices = {
            "inputs": ("quantized", "float"),
            "loss": ("token", "mse"),
            "start": ("smooth", "given"),
            "init_peaks": PEAKS,
        }
        check_choices("affinequant", self, choices)
        check_bounds("affinequant", self, {"aug_loss": "0 or more", "init_power": "from 0 to 1"})
