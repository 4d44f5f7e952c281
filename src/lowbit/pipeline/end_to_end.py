"""End-to-end correction: residual errors of the quantized blocks, fitted against the float model's distributions.

Every learned step before this one fits hidden states, one block or window at a time. Model quality depends on the
next-token distribution, where the following blocks amplify some errors and damp others. Here all blocks are corrected
jointly to minimize the mean of ``KL(float || quantized)`` over calibration tokens, in nats a token: a low-rank pair
``B A`` for every quantized linear (as in QLLM's correction, Liu et al. 2024, arXiv 2310.08041, section 3.3, whose
window is four blocks), the range ends of the weights (scales and zero points: Chen et al. 2024, EfficientQAT, arXiv
2407.11062, section 3.3) and the norms' gains. Everything is merged: ``fake_quant(W + B A / r)`` is both what is
trained and what ships, with the scale used exactly as stored.

Only one block's weights are in memory at a time. A step runs the blocks one after another from files
(``runs/latent_weights.py``), keeps only each block's input, and reruns each block in the backward pass to
differentiate it: gradient checkpointing with the weights on disk. The learned parameters stay in memory: low-rank
pairs, range ends, gains, Adam's moments.

The fit starts from the result of the earlier steps and ends with the parameters that are best on the validation
split, which are the initial ones if nothing improves. The state is saved after each epoch; a resumed run ends with
the same bits as an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowbit.analysis.linear_error import layer_sensitivity
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.distributed.exchange import by_first
from lowbit.methods.fit_state import Fitted
from lowbit.methods.training import fit
from lowbit.methods.tune import Tune
from lowbit.models.block import Block, Note
from lowbit.models.forward import run, run_all
from lowbit.models.offload import Rows
from lowbit.models.shard import States
from lowbit.pipeline.hidden_states import embedded
from lowbit.pipeline.runner import Walk
from lowbit.pipeline.shared_run import check_same_bits, exist, see
from lowbit.progress import say
from lowbit.quant.elements import given
from lowbit.quant.format import Format, QParams
from lowbit.runs.folder import FIRST, RUN, block_file, notes_file, pictures_file
from lowbit.runs.latent_weights import Latents, latent, latent_file

STATE = "tune.safetensors"
LOGIT_BYTES = 1 << 27  # logits of one model held at once


def tune(options: Tune, walk: Walk, ids: Tensor) -> None:
    """Run the block steps, correct their result end to end, and write every block's shard to ``walk``'s folder.

    Args:
        options: options of the ``tune`` step.
        walk: the run's walk; afterwards it finds all shards done and only measures them.
        ids: calibration tokens ``(sequences, length)``.
    """
    layers = len(walk.skeleton.layers)
    if exist(*(walk.out / block_file(index) for index in range(layers))):
        return
    first = replace(walk, out=walk.out / FIRST, latents=True, rows=[], observed={})
    by_first(lambda: (first.out / RUN).mkdir(parents=True, exist_ok=True))
    y_fp = first.walk(ids)
    began = time.monotonic()
    tuning = Tuning(options, first, ids, y_fp)
    fitted = fit(
        tuning.groups(),
        tuning.loss,
        len(ids),
        options.schedule,
        begin=tuning.begin,
        keep=walk.out / RUN / STATE,
        ahead=tuning.rows.prepare,
        share=tuning.rows.share,
    )
    for note in _notes(fitted):
        say(note)
    x = tuning.teacher.embed(ids[:1].to(walk.device))
    for index in range(layers):
        block, float_block = tuning.quantize_layer(index, fitted), first.float_block(index)
        if not exist(walk.out / block_file(index)):
            sensitivity, before = layer_sensitivity(block, x), read_json(first.out / notes_file(index))["seconds"]
            seconds = before + (time.monotonic() - began) / layers
            check_same_bits(block)
            by_first(partial(walk.write, block, sensitivity, seconds))
        x = run_all(float_block, x)


class Tuning:
    """The fit: learned parameters, loss, and the quantized blocks that result."""

    def __init__(self, options: Tune, first: Walk, ids: Tensor, y_fp: States) -> None:
        """Start from the files that ``first`` wrote; ``y_fp`` holds the float model's last hidden states."""
        self.options, self.formats, self.device, self.folder = options, first.plan.formats, first.device, first.out
        self.teacher, self.student = first.skeletons(ids)
        x = embedded(self.student, ids, self.device, first.batch)
        self.rows = Rows(torch.device(self.device), x, y_fp, ids.to(self.device))
        self.layers = range(len(self.student.layers))
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self.ends: dict[str, tuple[Tensor, ...]] = {}
        self.gains: dict[str, Tensor] = {}
        self.begun = 0
        for index in self.layers:
            self._start(index)
        self.rate = options.rate(self.lost(len(ids))) if options.scale else 1.0

    @torch.no_grad()
    def lost(self, sequences: int) -> float:
        """Divergence before the first step, in nats a token, over up to four training sequences."""
        train, _ = self.options.schedule.split(sequences)
        self.rows.everywhere(train[:4])
        return float(self.loss(train[:4]))

    def _start(self, index: int) -> None:
        """Initialize a layer's learned parameters: zero corrections, unchanged range ends and gains."""
        generator = torch.Generator().manual_seed(index)
        block, latents = self._read(index)
        for name, qparams in latents.qparams.items():
            rows, columns = latents.places[name].shape
            rank = min(self.options.rank, rows, columns)
            down = (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
            up = torch.zeros(rows, rank, device=self.device)
            self.pairs[name] = up.requires_grad_(), down.to(self.device).requires_grad_()
            if self.options.ends and block.weight_format(name).learns_range:
                sides = 2 if block.weight_format(name).independent_ends else 1
                self.ends[name] = tuple(torch.zeros_like(qparams.scale).requires_grad_() for _ in range(sides))
        if self.options.norms:
            for norm in {edge.src.parameter for edge in block.edges() if edge.kind == "norm"}:
                self.gains[norm] = block.params[norm].clone().requires_grad_()

    def _read(self, index: int) -> tuple[Block, Latents]:
        """Read a layer from its file: a block with the unquantized parameters, and the latent weights."""
        see(self.folder / latent_file(index))
        file = Checkpoint(self.folder, [latent_file(index)])
        latents = Latents({name: value.to(self.device) for name, value in file.read(file.names).items()})
        block = self.student.block(index, latents.params, formats=self.formats)
        return replace(block, ops=latents.ops, input_qparams=latents.input_qparams), latents

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Groups of learned parameters with their learning rates."""
        options = self.options
        return [
            ([leaf for pair in self.pairs.values() for leaf in pair], self.rate * options.lr),
            ([leaf for ends in self.ends.values() for leaf in ends], self.rate * options.lr_ends),
            ([self.gains[name] for name in sorted(self.gains)], self.rate * options.lr_norms),
        ]

    def begin(self, epoch: int) -> None:
        """Report progress: an epoch runs every sequence through the whole model."""
        if epoch > self.begun:
            say(f"tune: epoch {epoch} of {self.options.schedule.epochs}")
            self.begun = epoch

    def loss(self, chosen: Tensor) -> Tensor:
        """Mean divergence over the chosen sequences, in nats a token; differentiable in all learned parameters."""
        x, y_fp, ids = self.rows(chosen)
        for index in self.layers:
            if torch.is_grad_enabled():
                x = checkpoint(self._through, index, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._through(index, x)
        return self._divergence(x, y_fp, ids)

    def _through(self, index: int, x: Tensor) -> Tensor:
        """Hidden states after a layer quantized with the current parameters."""
        block, latents = self._read(index)
        quantized: dict[str, Tensor] = {}
        for name, (weight, qparams, format) in self._linears(block, latents).items():
            value, op = format.fake_quant(weight, qparams), block.ops.get(name)
            quantized[f"{name}.weight"] = value if op is None else op.weight(value)
        return run(block, x, {**block.params, **self._own_gains(index), **quantized}, quantized=True)

    def _own_gains(self, index: int) -> dict[str, Tensor]:
        return {name: value for name, value in self.gains.items() if name.startswith(f"{index}.")}

    def _linears(self, block: Block, latents: Latents) -> dict[str, tuple[Tensor, QParams, Format]]:
        """Weight with its correction, qparams and format of each quantized linear."""
        out, ranges = {}, self._ranges(block, latents)
        peaks = {name: torch.maximum(-low, high) for name, (low, high) in ranges.items()}
        for name, qparams in latents.qparams.items():
            format = block.weight_format(name)
            up, down = self.pairs[name]
            weight = latent(latents.places[name], qparams, format) + (up @ down) / up.shape[1]
            if name in ranges:
                moved = format.from_range(*ranges[name], block.tensor_peak(name, peaks))
                # What a search chose is no format's rule: ranges that have not moved keep their qparams.
                still = torch.stack([(end == 0).all() for end in self.ends[name]]).all()
                kept = (torch.where(still, old, new.detach()) for old, new in zip(qparams, moved, strict=True))
                qparams = QParams(*(given(new, value) for new, value in zip(moved, kept, strict=True)))
            out[name] = weight, qparams, format
        return out

    def _ranges(self, block: Block, latents: Latents) -> dict[str, tuple[Tensor, Tensor]]:
        """The ranges with learned ends, ``(low, high)`` of each group, by linear."""
        ranges = {}
        for name, ends in self.ends.items():
            if (qparams := latents.qparams.get(name)) is not None:
                bottom, top = block.weight_format(name).range_of(qparams)
                ranges[name] = bottom * ends[0].exp(), top * ends[-1].exp()
        return ranges

    def _divergence(self, hidden: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """``KL(float || quantized)`` from the last block's outputs ``(sequences, length, hidden)``, mean over tokens.

        Logits are computed and differentiated for a few positions at a time; only the gradient with respect to
        ``hidden`` is kept.
        """
        differentiate = torch.is_grad_enabled()
        leaf = hidden.detach().requires_grad_(differentiate)
        tokens, vocabulary = ids.numel(), self.student.text_config.vocab_size
        total = torch.zeros((), device=hidden.device)
        positions = torch.arange(ids.shape[1], device=hidden.device)
        for chunk in positions.split(max(1, LOGIT_BYTES // (4 * vocabulary * len(ids)))):
            with torch.no_grad():
                exact = self.teacher.logits(ids, y, chunk).float().log_softmax(-1)
            ours = self.student.logits(ids, leaf, chunk).float().log_softmax(-1)
            divergence = (exact.exp() * (exact - ours)).sum() / tokens
            if differentiate:
                divergence.backward()
            total += divergence.detach()
        return _Known.apply(hidden, total, leaf.grad) if differentiate else total

    @torch.no_grad()
    def quantize_layer(self, index: int, fitted: Fitted) -> Block:
        """A layer as it ships, with the notes and records of its steps and of this one."""
        block, latents = self._read(index)
        linears = self._linears(block, latents)
        written = read_json(self.folder / notes_file(index))
        steps: dict[str, Any] = {**written["record"].get("steps", {})}
        notes = [Note(index, text) for text in written["notes"]]
        if index == 0:
            steps["tune"] = _record(fitted) | {"rate": self.rate}
            notes += [Note(index, text) for text in _notes(fitted)]
        pictures: Mapping[str, Tensor] = {}
        if (self.folder / pictures_file(index)).exists():
            file = Checkpoint(self.folder, [pictures_file(index)])
            pictures = file.read(file.names)
        return replace(
            block,
            params={
                **block.params,
                **{name: value.detach() for name, value in self._own_gains(index).items()},
                **{f"{name}.weight": weight for name, (weight, _, _) in linears.items()},
            },
            qweights={name: format.quantize(weight, qparams) for name, (weight, qparams, format) in linears.items()},
            notes=tuple(notes),
            record={index: steps} if steps else {},
            pictures=pictures,
        )


def _notes(fitted: Fitted) -> list[str]:
    """Notes for the report."""
    nothing = [] if fitted.best else ["no epoch improves the validation loss; no correction is applied"]
    return [f"tune: {note}" for note in [*fitted.notes, *nothing]]


def _record(fitted: Fitted) -> dict[str, Any]:
    """Figures for the report; losses are in nats a token."""
    return {
        "loss": fitted.train,
        "held_out": [value if math.isfinite(value) else None for value in fitted.held_out],
        "best_epoch": fitted.best,
        "skipped_steps": fitted.skipped,
        "unit": "nats a token",
    }


class _Known(torch.autograd.Function):
    """A value with a precomputed gradient with respect to ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad[0] * gradient, None, None
