"""Low-rank error correction: a weight update trained over a window of blocks and merged before quantization.

Source: QLLM, Liu et al., ICLR 2024, arXiv 2310.08041, section 3.3: a pair ``B A`` of rank 4 for every projection,
trained against the float output of several consecutive blocks, so that a block compensates for the error of those
before it.

The paper trains ``Q(W) + B A / r`` and then quantizes ``W + B A / r``, so that the trained and the stored weights
differ (it measures 9.35 and 9.65 perplexity). Here training goes through the quantizer, ``Q(W + B A / r)``, with the
qparams of the step that quantizes; with ``rtn`` after it, trained and stored weights agree bit for bit. Clipping
ratios of an earlier step can be trained further, since the weights that they were chosen for change. The architecture
is unchanged: no bias, no online product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.methods.clipping import LearnedClips
from lowbit.methods.fit_state import Fitted
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.searched_clips import SearchedClips, split_by_format
from lowbit.methods.training import Schedule, fit, loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run
from lowbit.models.offload import Rows
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat

CHOICES = {"ranks": ("fixed", "adaptive"), "share": ("none", "input"), "loss": ("token", "mse")}


@dataclass(frozen=True)
class LowRank(Method):
    """A merged low-rank correction of every quantized linear.

    Attributes:
        rank: rank of each linear's pair (the paper's is 4; merged, a rank costs nothing at run time); with ``ranks:
            adaptive``, this rank for all linears sets the parameter budget.
        ranks: ``fixed``, or ``adaptive``: larger where the quantization error has larger singular values.
        share: ``input`` adds one pair over all linears that read one input, next to one per linear, each of half the
            rank.
        loss: ``token`` or ``mse``; see ``AffineQuant``.
        clips: also train the weights' clipping ratios; those of formats other than integers are searched
            (``searched_clips.py``).
        norms: also train the norms' gains.
        lr, lr_clips, lr_norms: learning rates of the pairs, of the clipping ratios' logits, of the gains. The
            paper's 5e-4 assumes thousands of steps; a quick run has about 80.
        weight_decay: regularization against overfitting the calibration sequences: weight of the corrections' mean
            square relative to that of the weights.
        schedule: epochs, batches, validation split, gradient clipping and learning-rate decay.
    """

    rank: int = 32
    ranks: str = "fixed"
    share: str = "none"
    loss: str = "token"
    clips: bool = True
    norms: bool = False
    lr: float = 2e-2
    lr_clips: float = 0.1
    lr_norms: float = 1e-4
    weight_decay: float = 0.0
    schedule: Schedule = Schedule()
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "x_q"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choices("lowrank", self, CHOICES)
        rates = dict.fromkeys(("lr", "lr_clips", "lr_norms", "weight_decay"), "0 or more")
        check_bounds("lowrank", self, {"rank": "1 or more", **rates})

    @property
    def passes(self) -> int:
        """One for the starting point, then forward and backward in each epoch."""
        return 1 + 4 * self.schedule.epochs

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: corrections merge into the weights."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The window with corrections merged; its float function changes, so that its quantized output improves."""
        if not block.formats:
            return block
        correction = Correction(self, with_input_ranges(block, calib), calib)
        fitted = fit(
            correction.groups(),
            correction.loss,
            len(calib.x_q),
            self.schedule,
            block.start,
            correction.searched.begin,
            end=correction.end,
            ahead=correction.rows.prepare,
            share=correction.rows.share,
        )
        return correction.fold(fitted)


@dataclass(frozen=True)
class Pair:
    """``B A`` over the stacked rows of one or more linears: ``up`` ``(rows, rank)``, ``down`` ``(rank, in)``."""

    linears: tuple[str, ...]
    up: Tensor
    down: Tensor

    def change(self, rows: dict[str, int]) -> dict[str, Tensor]:
        """The update of each linear's weight, ``B A / rank`` as in the paper."""
        whole = (self.up @ self.down) / self.up.shape[1]
        parts = whole.split([rows[name] for name in self.linears])
        return dict(zip(self.linears, parts, strict=True))


class Correction:
    """Training of one window: pairs, clipping ratios, gains, loss, and merging."""

    def __init__(self, options: LowRank, block: Block, calib: Calib) -> None:
        self.options, self.block, self.calib = options, block, calib
        self.linears = block.quantized_linears()
        self.outputs = {name: block.weight(name).shape[0] for name in self.linears}
        generator = torch.Generator().manual_seed(block.start)
        self.pairs = [self._pair((name,), rank, generator) for name, rank in self._ranks().items()]
        if options.share == "input":
            for group in block.linear_groups():
                readers = tuple(name for name in group if name in self.outputs)
                if len(readers) > 1:
                    self.pairs.append(self._pair(readers, self._half(options.rank), generator))
        learned, searched = split_by_format(block) if options.clips else ([], [])
        self.ratios = {name: LearnedClips.of(block, name) for name in learned}
        train, _ = options.schedule.split(len(calib.x_q))
        self.searched = SearchedClips(searched, calib, train)
        self.searched.search(block)
        self.gains = self._gains() if options.norms else {}
        self.power = {name: block.weight(name).square().sum() for name in self.linears}
        self.unit = loss_unit(calib.y_fp, options.loss, block.device, calib.batch)
        self.rows = Rows(block.device, calib.x_q, calib.y_fp, self.unit)

    def _half(self, rank: int) -> int:
        return max(1, rank // 2)

    def _pair(self, linears: tuple[str, ...], rank: int, generator: torch.Generator) -> Pair:
        """A pair that starts at 0: ``B`` is zero, ``A`` has torch's initialization of a linear (Kaiming uniform)."""
        columns = self.block.weight(linears[0]).shape[1]
        device = self.block.device
        down = (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
        up = torch.zeros(sum(self.outputs[name] for name in linears), rank, device=device)
        return Pair(linears, up.requires_grad_(), down.to(device).requires_grad_())

    def _ranks(self) -> dict[str, int]:
        """The rank of each linear's own pair."""
        rank = self._half(self.options.rank) if self.options.share == "input" else self.options.rank
        if self.options.ranks == "fixed":
            return {name: min(rank, *self.block.weight(name).shape) for name in self.linears}
        errors = {}
        for name in self.linears:
            weight = self.block.weight(name)
            quantized = self.block.weight_format(name).fake_quant(weight, self.block.qparams(name))
            errors[name] = torch.linalg.svdvals(weight - quantized).square()
        return adaptive_ranks(errors, {name: sum(self.block.weight(name).shape) for name in self.linears}, rank)

    def _gains(self) -> dict[str, Tensor]:
        names = {edge.src.parameter for edge in self.block.edges() if edge.kind == "norm"}
        return {name: self.block.params[name].clone().requires_grad_() for name in sorted(names)}

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Learned tensors with their learning rates."""
        pairs = [leaf for pair in self.pairs for leaf in (pair.up, pair.down)]
        clips = [leaf for pair in self.ratios.values() for leaf in pair.leaves()]
        options = self.options
        return [(pairs, options.lr), (clips, options.lr_clips), (list(self.gains.values()), options.lr_norms)]

    def params(self) -> dict[str, Tensor]:
        """Float parameters with corrections and gains applied; differentiable."""
        params = {**self.block.params, **self.gains}
        for pair in self.pairs:
            for name, change in pair.change(self.outputs).items():
                params[f"{name}.weight"] = params[f"{name}.weight"] + change
        return params

    def clips(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Clipping ratios for the step that quantizes."""
        return {
            **self.block.clips,
            **self.searched.now,
            **{name: pair.values() for name, pair in self.ratios.items()},
        }

    def end(self) -> None:
        """After an epoch: search the scales that are not learned."""
        self.searched.search(replace(self.block, params=self.params(), clips=self.clips()))

    def quantized(self) -> Mapping[str, Tensor]:
        """Quantized parameters, as they are stored; differentiable."""
        return self.block.fake_quant_clipped(self.params(), self.clips())

    def loss(self, indices: Tensor) -> Tensor:
        """The window's output error on the sequences ``indices``, relative to its float output, plus weight decay."""
        x, y_fp, unit = self.rows(indices)
        error = relative_loss(run(self.block, x, self.quantized(), quantized=True), y_fp, unit)
        if not (self.options.weight_decay and torch.is_grad_enabled()):
            return error
        sizes = [
            change.square().sum() / self.power[name]
            for pair in self.pairs
            for name, change in pair.change(self.outputs).items()
        ]
        return error + self.options.weight_decay * torch.stack(sizes).mean()

    @torch.no_grad()
    def fold(self, fitted: Fitted) -> Block:
        """The window with everything merged."""
        record: dict[str, Any] = {
            "loss": fitted.train,
            "held_out": [value if math.isfinite(value) else None for value in fitted.held_out],
            "best_epoch": fitted.best,
            "skipped_steps": fitted.skipped,
            "ranks": {"+".join(pair.linears): pair.up.shape[1] for pair in self.pairs},
        }
        notes = list(fitted.notes)
        if self.options.schedule.epochs and not fitted.best:
            notes.append("no epoch improves the validation loss; no correction is applied")
        done = replace(
            self.block,
            params={name: value.detach() for name, value in self.params().items()},
            clips={name: (low.detach(), high.detach()) for name, (low, high) in self.clips().items()},
        )
        return done.with_notes("lowrank", *notes).with_record("lowrank", record)


def adaptive_ranks(errors: dict[str, Tensor], cost: dict[str, int], rank: int) -> dict[str, int]:
    """Ranks, at least 1 each, that together cost no more than ``rank`` for every linear.

    Greedy: the next rank goes to the linear where it removes the most squared quantization error per parameter.

    Args:
        errors: for each linear the squared singular values of its quantization error, largest first.
        cost: parameters of one rank.
        rank: the budget, as a rank for all.

    >>> errors = {"a": torch.tensor([9.0, 8.0, 7.0]), "b": torch.tensor([1.0, 0.5, 0.1])}
    >>> adaptive_ranks(errors, {"a": 10, "b": 10}, 2)
    {'a': 3, 'b': 1}
    """
    ranks = dict.fromkeys(errors, 1)
    budget = (rank - 1) * sum(cost.values())
    while True:
        growable = [n for n in errors if ranks[n] < len(errors[n]) and cost[n] <= budget]
        if not growable:
            return ranks
        best = max(growable, key=lambda name: float(errors[name][ranks[name]]) / cost[name])
        ranks[best] += 1
        budget -= cost[best]
