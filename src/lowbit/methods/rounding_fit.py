"""Learned rounding of one block: where it starts, its loss, and the codes that come of it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.methods.adam import Adam
from lowbit.methods.cold import quantized_without_data, with_cold_note
from lowbit.methods.fit_state import Fitted
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.learned_codes import PARAMETRISATIONS, LearnedCodes, Start, latent_weight
from lowbit.methods.learned_scales import LearnedScales
from lowbit.methods.optimizer import Groups, Optimizer
from lowbit.methods.rounding_options import STARTS, RoundingOptions
from lowbit.methods.searched_clips import split_by_format, with_searched_clips
from lowbit.methods.sign_descent import SignDescent
from lowbit.methods.statistics import column_importance
from lowbit.methods.training import Schedule, loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run, run_all
from lowbit.models.offload import Rows, select_sequences
from lowbit.models.shard import Shard, States, own_states
from lowbit.quant.format import QTensor

LARGEST = 0.01  # step of a ratio: with few steps, larger ones move every code of a group at once
MOMENTUM = 0.9  # of the sign steps where noise is drawn


class RoundingFit:
    """Training of one block.

    Attributes:
        block: the block with the codes of the start.
        codes, scales: what is learned, by linear.
    """

    def __init__(self, options: RoundingOptions, schedule: Schedule, block: Block, calib: Calib) -> None:
        self.options, self.schedule = options, schedule
        self.steps = schedule.steps(len(calib.x_q))
        self.taken = 0
        self.block, cold = started(options, schedule, block, calib)
        y = target(block, calib, options.correct)
        ends = options.parametrisation == "sign"
        self.codes: dict[str, LearnedCodes] = {}
        self.scales: dict[str, LearnedScales] = {}
        for name in (name for name in self.block.quantized_linears() if name not in cold):
            q = self.block.qweights[name]
            start = Start(latent_weight(block.weight(name), q), q.qparams, q.format, options.bound)
            self.codes[name] = PARAMETRISATIONS[options.parametrisation](start)
            self.scales[name] = LearnedScales.of(self.block, name, q.qparams, options.scales, ends)
        self.weights = sum(block.weight(name).numel() for name in self.codes)
        self.unit = loss_unit(y, options.loss, block.device, calib.batch)
        self.rows = Rows(block.device, calib.x_q, y, self.unit)
        self.start_loss = self._loss_of_the_start(len(calib.x_q)) if options.parametrisation == "sigmoid" else 0.0

    @torch.no_grad()
    def _loss_of_the_start(self, sequences: int) -> float:
        """The error of the start's codes on up to four training sequences."""
        train, _ = self.schedule.split(sequences)
        self.rows.everywhere(train[:4])
        return float(self.loss(train[:4]))

    def groups(self) -> Groups:
        """Learned tensors with their learning rates."""
        codes = [leaf for own in self.codes.values() for leaf in own.leaves]
        ratios = [ratio for own in self.scales.values() for ratio in own.ratios]
        options, steps = self.options, max(self.steps, 1)
        unit = PARAMETRISATIONS[options.parametrisation].unit
        return [(codes, unit * options.lr / steps), (ratios, min(options.lr_scales / steps, LARGEST))]

    def optimizer(self, groups: Groups) -> Optimizer:
        """Adam for gates, whose gradients have sizes that count; signs for the others."""
        if self.options.parametrisation == "sigmoid":
            return Adam(groups)
        return SignDescent(groups, MOMENTUM if self.options.parametrisation == "gumbel" else 0.0)

    def begin(self, epoch: int) -> None:
        """Count steps from the epoch's first: what is annealed and drawn depends on their number alone."""
        self.taken = (epoch - 1) * self.steps // max(self.schedule.epochs, 1)

    def project(self) -> None:
        """After each step: bounds, and one more step taken."""
        for codes, scales in zip(self.codes.values(), self.scales.values(), strict=True):
            codes.project()
            scales.project()
        self.taken += 1

    def loss(self, indices: Tensor) -> Tensor:
        """The block's output error on the sequences ``indices``, relative to the target's mean square.

        Without gradients it is that of the codes as they ship.
        """
        x, y, unit = self.rows(indices)
        values = self._trained if torch.is_grad_enabled() else self._chosen
        params = self.block.with_weights(
            {**self.block.params, **self._fixed()}, {name: partial(values, name) for name in self.codes}
        )
        error = relative_loss(run(self.block, x, params, quantized=True), y, unit)
        return error + self._penalty() if torch.is_grad_enabled() else error

    def _fixed(self) -> dict[str, Tensor]:
        """Weights whose codes are not learned."""
        others = {name: q for name, q in self.block.qweights.items() if name not in self.codes}
        return {f"{name}.weight": q.dequantize() for name, q in others.items()}

    def _trained(self, name: str) -> Tensor:
        index = list(self.codes).index(name)
        noise = torch.Generator(self.block.device)
        noise.manual_seed((self.block.start * 1_000_003 + self.taken) * 4_096 + index)
        return self.codes[name].values(self.scales[name].qparams(), self._progress, noise)

    def _chosen(self, name: str) -> Tensor:
        return self.codes[name].chosen(self.scales[name].qparams())

    @property
    def _progress(self) -> float:
        return min(self.taken / max(self.steps, 1), 1.0)

    def _penalty(self) -> Tensor | float:
        """The parametrisation's regulariser: its mean over all weights, in units of the start's loss."""
        parts = [part for own in self.codes.values() if (part := own.penalty(self._progress)) is not None]
        weight = self.options.regularization * self.start_loss / self.weights
        return weight * torch.stack(parts).sum() if parts else 0.0

    @torch.no_grad()
    def fold(self, fitted: Fitted) -> Block:
        """The block with the learned codes; with those of the start where no epoch was better."""
        learned = {name: self._quantized(name) for name in self.codes} if fitted.best else {}
        changed = sum(int((q.codes != self.block.qweights[name].codes).sum()) for name, q in learned.items())
        record: dict[str, Any] = {
            "loss": fitted.train,
            "held_out": [value if math.isfinite(value) else None for value in fitted.held_out],
            "best_epoch": fitted.best,
            "skipped_steps": fitted.skipped,
            "changed_codes": changed / max(self.weights, 1),
        }
        notes = list(fitted.notes)
        if self.schedule.epochs and self.codes and not fitted.best:
            notes.append("no epoch improves the validation loss; the codes of the start are kept")
        done = replace(self.block, qweights={**self.block.qweights, **learned})
        return done.with_notes("rounding", *notes).with_record("rounding", record)

    def _quantized(self, name: str) -> QTensor:
        """Values on the grid: rounding them to nearest gives exactly their codes."""
        qparams = self.scales[name].qparams()
        return self.block.weight_format(name).quantize(self.codes[name].chosen(qparams), qparams)


def target(block: Block, calib: Calib, correct: float) -> States:
    """What the block's output shall be: ``F(x_q) + correct * (y_fp - F(x_q))`` with its float function ``F``.

    ``y_fp - F(x_q)`` is what the errors of earlier blocks have become behind this one. On the training sequences,
    which those blocks were fitted to, these errors are several times smaller than on any others, and codes that make
    up for all of them fit these sequences: with half of it as the target the same steps give lower errors on others.
    """
    if correct == 1:
        return calib.y_fp
    own = run_all(block, calib.x_q, batch=calib.batch)
    if isinstance(own, Shard):
        return own.with_own(own.own.lerp_(own_states(calib.y_fp), correct))
    return own.lerp_(own_states(calib.y_fp), correct)


def started(options: RoundingOptions, schedule: Schedule, block: Block, calib: Calib) -> tuple[Block, dict[str, int]]:
    """The block with the start's codes, and experts' linears that too few tokens reach, with the tokens.

    Whatever is fitted or counted here sees the training sequences alone: the validation error of the start is that
    of sequences that it does not know.
    """
    block = with_input_ranges(block, calib)
    train, _ = schedule.split(len(calib.x_q))
    x_fp, x_q, y_fp = (select_sequences(states, train) for states in (calib.x_fp, calib.x_q, calib.y_fp))
    visible = replace(calib, x_fp=x_fp, x_q=x_q, y_fp=y_fp)
    _, searched = split_by_format(block)
    if options.scales and searched:
        block = with_searched_clips(block, calib, train, searched)
    experts = [name for name in block.quantized_linears() if block.expert_of(name) is not None]
    _, cold = column_importance(block, visible, experts) if experts else ({}, {})
    block = STARTS[options.start]()(block, visible)
    block = replace(block, qweights={**block.qweights, **quantized_without_data(block, cold)})
    return with_cold_note(block, "rounding", cold, "codes not learned"), cold
