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

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lowbit.errors import LowbitError, unknown
from lowbit.methods.maps import Kind, LearnedMap
from lowbit.methods.rtn import RTN
from lowbit.methods.signs import with_signs
from lowbit.methods.sites import SITES, Site, apply, make_site, site_name, start
from lowbit.methods.training import Fitted, Schedule, fit, loss_unit, relative_loss
from lowbit.models.architecture import module_of
from lowbit.models.block import Block, Calib, part_of, recorded, relative_error, run, run_all
from lowbit.models.offload import Rows
from lowbit.quant.inductor import rounded_weight
from lowbit.quant.scheme import Scheme

CHOICES = {
    **dict.fromkeys(SITES, ("off", "diagonal", "matrix")),
    "channels": ("off", "diagonal"),
    "parametrisation": ("masked", "lu", "blocks", "svd"),
    "mask": ("gradual", "released", "none"),
    "dominance": ("enforce", "report", "off"),
    "precision": ("float", "double", "float-double"),
    "loss": ("token", "mse"),
    "start": ("smooth", "given"),
}
CLIP_START = 4.0  # sigmoid(4) = 0.982 of the range, as in OmniQuant


@dataclass(frozen=True)
class AffineQuant:
    """Learned equivalent maps and clipping.

    Attributes:
        qkv: map after the norm before q, k and v: ``off``, ``diagonal``, or ``matrix``, which stays online.
        mlp: the same for the norm before the MLP.
        heads: map from v to o, one for each KV head.
        qk: map between q and k; under a rotary embedding ``matrix`` means scaled rotations.
        channels: map from up to down (fc1 to fc2): ``off`` or ``diagonal``.
        signs: turn channels over first, so that a token's outliers lie on one side of zero; not in the papers.
        shift: also learn shifts where both ends of a site have a bias.
        parametrisation: of the matrices: ``masked``, ``lu``, ``blocks`` or ``svd``.
        block_size: of ``blocks``; where it does not divide a width, the next smaller number that does.
        mask: how the matrices open: ``gradual`` (the paper's), ``released`` (its code's), ``none``.
        stability: the factor on all entries off the diagonal.
        dominance: ``enforce`` keeps every matrix strictly diagonally dominant after each step, ``report`` records the
            margins, ``off`` leaves them out.
        condition: largest condition number of a map.
        precision: of the maps: ``float``, ``float-double`` (maps and merged weights in float64, the block in
            float32), ``double`` (all in float64).
        clip: learn factors on the ends of every weight group's range.
        act_clip: learn factors on the ends of the tokens' ranges; no stock runtime has them, so they stay online.
        loss: ``token`` divides each token's squared error by the mean square of its float output; with ``mse``, the
            papers', the few tokens with massive activations decide alone.
        aug_loss: weight of a second error, against the float block on the quantized input.
        epochs, batch, held_out, grad_clip, decay: see ``learn.Schedule``.
        lr_maps, lr_clips: learning rates of maps and shifts, and of the clipping factors' logits. The papers' 5e-3
            and 1e-2 are for thousands of steps; a quick run has some 80.
        window: consecutive layers that are fitted together, where the recipe's window has more.
        start: ``smooth`` moves SmoothQuant's scale into the block first; ``given`` takes the block as it comes, for
            use behind a step such as ``awq`` that has moved scales itself.
        init_power: how much of the activations' outliers a smooth start moves into the weights.
    """

    qkv: str = "diagonal"
    mlp: str = "diagonal"
    heads: str = "matrix"
    qk: str = "matrix"
    channels: str = "diagonal"
    signs: bool = True
    shift: bool = True
    parametrisation: str = "masked"
    block_size: int = 16
    mask: str = "gradual"
    stability: float = 1.0
    dominance: str = "report"
    condition: float = 1e3
    precision: str = "float"
    clip: bool = True
    act_clip: bool = False
    loss: str = "token"
    aug_loss: float = 0.0
    epochs: int = 20
    batch: int = 1
    lr_maps: float = 2e-2
    lr_clips: float = 0.3
    start: str = "smooth"
    init_power: float = 0.5
    held_out: float = 0.125
    grad_clip: float = 0.0
    decay: str = "cosine"
    window: int = 1
    rounds: ClassVar[bool] = False

    @property
    def passes(self) -> int:
        """Forward passes that it costs: one for the start, then forward and backward in each epoch."""
        return 2 + 4 * self.epochs

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise unknown(f"affinequant.{name}", getattr(self, name), allowed)
        if self.dominance == "enforce" and self.parametrisation not in ("masked", "blocks"):
            raise LowbitError(
                f"affinequant: dominance 'enforce' with parametrisation '{self.parametrisation}': it can be kept for "
                "masked and blocks only; take one of these, or dominance report"
            )
        bounds = (
            self.window >= 1,
            self.stability >= 0,
            self.condition > 1,
            self.block_size > 0,
            0 <= self.init_power <= 1,
        )
        if not all(bounds) or min(self.aug_loss, self.lr_maps, self.lr_clips) < 0:
            raise LowbitError(
                "affinequant: stability, aug_loss and learning rates must be 0 or more, condition above 1, "
                "block_size and window 1 or more, init_power from 0 to 1"
            )
        self.schedule(0)

    def schedule(self, seed: int) -> Schedule:
        """The loop's options; ``seed`` draws the order of the sequences."""
        return Schedule(self.epochs, self.batch, self.held_out, self.grad_clip, self.decay, seed)

    def __call__(self, block: Block, calib: Calib, scheme: Scheme) -> Block:
        """The block with maps merged and clips chosen; its float function is unchanged."""
        if all(block.weight_spec(name, scheme) is None for name in block.linears()):
            return block
        if len(block.layers) > self.window:
            return self._in_turn(block, calib, scheme)
        trainer = Trainer(self, block, calib, scheme)
        fitted = fit(
            trainer.groups(),
            trainer.loss,
            len(calib.x_q),
            # Blocks draw differently, and a run that was resumed as one that was not.
            self.schedule(block.start),
            trainer.begin,
            trainer.project,
            ahead=trainer.rows.prepare,
        )
        return trainer.merged(fitted)

    def _in_turn(self, block: Block, calib: Calib, scheme: Scheme) -> Block:
        """A window that a later step gets as one: its layers are fitted ``self.window`` at a time, in turn."""
        x_fp, x_q, done = calib.x_fp, calib.x_q, block
        for first in range(0, len(block.layers), self.window):
            part = part_of(block, first, first + self.window)
            y_fp = run_all(part, x_fp, batch=calib.batch)
            fitted = self(part, Calib(x_fp, x_q, y_fp, calib.batch), scheme)
            rounded = RTN()(fitted, calib, scheme)
            x_fp, x_q = y_fp, run_all(rounded, x_q, rounded.quantized_params(), scheme, batch=calib.batch)
            done = replace(
                done,
                params={**done.params, **fitted.params},
                clips={**done.clips, **fitted.clips},
                online={**done.online, **fitted.online},
                notes=(*done.notes, *fitted.notes),
                record={**done.record, **fitted.record},
                pictures={**done.pictures, **fitted.pictures},
            )
        return done


class Trainer:
    """One block's fit: what is learned, the loss, the constraints, and the merge."""

    def __init__(self, options: AffineQuant, block: Block, calib: Calib, scheme: Scheme) -> None:
        self.options, self.block, self.calib, self.scheme = options, block, calib, scheme
        device = block.device
        self.dtype = torch.float32 if options.precision == "float" else torch.float64
        self.run_dtype = torch.float64 if options.precision == "double" else calib.x_q.dtype
        kind = cast(Kind, options.parametrisation)
        model = LearnedMap(
            kind, 0, 0, options.condition, options.mask, options.stability, options.block_size, self.dtype, device
        )
        named = [(edge, site_name(block, edge)) for edge in block.edges()]
        self.sites = [
            make_site(block, edge, name, choice, model, options.shift)
            for edge, name in named
            if (choice := getattr(options, name)) != "off"
        ]
        smooth = options.start == "smooth"
        self.base = (
            start(block, self.sites, calib.x_fp, options.init_power, calib.batch) if smooth else dict(block.params)
        )
        self.flipped: dict[str, int] = {}
        if options.signs and smooth:
            # Behind another step's maps its clips may stand, which are for the weights' ranges as they were.
            moved, edges = replace(block, params=self.base), [site.edge for site in self.sites]
            self.base, self.flipped = with_signs(moved, calib.x_fp, scheme, calib.batch, edges)
        # In float64 the weights are turned into it once, not at every step.
        self.start = {name: value.to(self.dtype) for name, value in self.base.items()}
        self.logits = self._clip_logits() if options.clip else {}
        self.act_logits = self._act_logits() if options.act_clip else {}
        self.unit = loss_unit(calib.y_fp, options.loss, device, calib.batch)
        also = [run_all(block, calib.x_q, batch=calib.batch)] if options.aug_loss else []
        self.rows = Rows(device, calib.x_q, calib.y_fp, self.unit, *also)
        self.shrunk = 0

    def _clip_logits(self) -> dict[str, tuple[Tensor, Tensor]]:
        logits = {}
        for name in self.block.linears():
            if (spec := self.block.weight_spec(name, self.scheme)) is not None:
                weight = self.block.weight(name)
                shape = (weight.shape[0], spec.groups(weight.shape[1]))
                low, high = (torch.full(shape, CLIP_START, device=weight.device) for _ in range(2))
                if name in self.block.clips and self.options.start == "given":
                    # Those of a step before; just inside of 0 and 1, where the sigmoid still has a slope.
                    found = (clip.to(weight).expand(shape) for clip in self.block.clips[name])
                    low, high = (clip.clamp(1e-3, 0.982).logit().clone() for clip in found)
                logits[name] = (low.requires_grad_(), high.requires_grad_())
        return logits

    def _act_logits(self) -> dict[str, Tensor]:
        """One pair for the linears that read one tensor: they share its rounding."""
        logits: dict[str, Tensor] = {}
        for group in self.block.linear_groups():
            shared = torch.full((2,), CLIP_START, device=self.block.device, requires_grad=True)
            for name in group:
                if self.scheme.act_spec(self.block.full_name(name)) is not None:
                    logits[name] = shared
        return logits

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """What is learned, with learning rates."""
        maps = [leaf for site in self.sites for leaf in site.leaves()]
        clips = [logit for pair in self.logits.values() for logit in pair]
        acts = list({id(logit): logit for logit in self.act_logits.values()}.values())
        return [(maps, self.options.lr_maps), ([*clips, *acts], self.options.lr_clips)]

    def begin(self, epoch: int) -> None:
        """Open the masks for an epoch."""
        for site in self.sites:
            site.map.begin(epoch, max(self.options.epochs, 1))

    def project(self) -> None:
        """After each step: dominance where it is asked for, conditioning always."""
        for site in self.sites:
            if site.map.is_matrix and self.options.dominance == "enforce":
                site.map.keep_dominant()
            self.shrunk += site.map.keep_condition()

    def quantized(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The block's parameters as they will ship, and what stays online; differentiable."""
        params, online = apply(self.block, self.sites, self.start)
        params = {name: value.float() for name, value in params.items()}
        rounded = {}
        for name in self.block.linears():
            if (spec := self.block.weight_spec(name, self.scheme)) is None:
                continue
            low, high = (logit.sigmoid() for logit in self.logits[name]) if name in self.logits else (1.0, 1.0)
            rounded[f"{name}.weight"] = rounded_weight(params[f"{name}.weight"], spec, low, high)
        online = {name: value.float() for name, value in online.items()}
        return {**params, **rounded}, online | {name: logit.sigmoid() for name, logit in self.act_logits.items()}

    def loss(self, chosen: Tensor) -> Tensor:
        """The block's error on the chosen sequences, relative to its float output's mean square."""
        params, online = self.quantized()
        x, y_fp, unit, *also = self.rows(chosen)
        # On a GPU the block may run in 16 bits; maps, quantizers and the loss stay in 32.
        y = run(replace(self.block, online=online), x.to(self.run_dtype), params, self.scheme)
        error = relative_loss(y, y_fp, unit)
        for y_aug in also:
            error = error + self.options.aug_loss * relative_loss(y, y_aug, unit)
        return error

    @torch.no_grad()
    def merged(self, fitted: Fitted) -> Block:
        """The block with everything folded in, by the code and in the precision that was trained."""
        params, online = apply(self.block, self.sites, self.start)
        params = {name: value.float() for name, value in params.items()}
        clips = {name: (low.sigmoid(), high.sigmoid()) for name, (low, high) in self.logits.items()}
        online = {name: value.float() for name, value in online.items()}
        online |= {name: logit.sigmoid() for name, logit in self.act_logits.items()}
        done = replace(
            self.block,
            params=params,
            clips={**self.block.clips, **clips},
            online={**self.block.online, **{name: value.contiguous() for name, value in online.items()}},
        )
        record = self.record(done, fitted)
        name = f"{self.block.start}." + self.block.family.attention
        notes = [f"affinequant: {name} and its block: {note}" for note in self._notes(fitted)]
        return replace(
            done,
            notes=(*self.block.notes, *notes),
            record=recorded(self.block, "affinequant", record),
            pictures={**self.block.pictures, **self.pictures()},
        )

    def record(self, done: Block, fitted: Fitted) -> dict[str, Any]:
        """What the report shows: losses, the maps' conditions and margins, and what merging cost."""
        some, wanted = (stream[:2].to(self.block.device) for stream in (self.calib.x_fp, self.calib.y_fp))
        sites = {}
        for site in self.sites:
            facts: dict[str, Any] = {"map": site.map.kind, "condition": float(site.map.conditions().max())}
            if self.options.dominance != "off" and site.map.is_matrix:
                facts["margin"] = float(site.map.margins().min())
            if (turned := self.flipped.get(module_of(site.edge.src))) is not None:
                facts["turned_over"] = turned
            sites[_key(site)] = facts
        return {
            "loss": fitted.train,
            "held_out": [value if math.isfinite(value) else None for value in fitted.held_out],
            "best_epoch": fitted.best,
            "skipped_steps": fitted.skipped,
            "pulled_to_condition": self.shrunk,
            "merge_error": relative_error(run_all(done, some), wanted),
            "sites": sites,
        }

    def pictures(self) -> dict[str, Tensor]:
        """The learned matrices, at a size to look at."""
        keys = ((_key(site).partition("."), site.map) for site in self.sites if site.map.is_matrix)
        return {f"{index}.affinequant.{name}": map.picture() for (index, _, name), map in keys}

    def _notes(self, fitted: Fitted) -> list[str]:
        notes = list(fitted.notes)
        if self.options.epochs and not fitted.best:
            notes.append("nothing learned was better on held-out sequences; the start was kept: scales only")
        if self.shrunk:
            notes.append(f"{self.shrunk} times a map was pulled back to condition {self.options.condition:g}")
        if self.options.qk == "matrix" and self.block.family.qk_norm_per_head:
            notes.append("q and k have norms, so only a diagonal tied within rotary pairs merges there")
        return notes


def _key(site: Site) -> str:
    """A site by its layer's index and its name: ``7.heads``."""
    return f"{module_of(site.edge.src).partition('.')[0]}.{site.name}"
