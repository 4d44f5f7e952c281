"""AffineQuant's training of one block: learned tensors, loss, constraints, and folding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lowbit.methods.affine_options import MIXES, Clipping, Maps, Objective, Sites
from lowbit.methods.clipping import LearnedClips, LearnedRatio
from lowbit.methods.deferred_maps import apply_deferring, deferrable
from lowbit.methods.fit_state import Fitted
from lowbit.methods.inputs import input_groups
from lowbit.methods.learned_mix import LearnedMix, learned_mixes
from lowbit.methods.maps import Kind, LearnedMap
from lowbit.methods.mixing import without_choices
from lowbit.methods.searched_clips import SearchedClips, split_by_format
from lowbit.methods.signs import with_signs
from lowbit.methods.sites import Site, apply, labelled, make_site, map_kind, site_name
from lowbit.methods.smooth_start import smooth_start
from lowbit.methods.static_inputs import LearnedInputs
from lowbit.methods.training import Schedule, loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.equivalence import Params
from lowbit.models.forward import relative_error, run, run_all
from lowbit.models.offload import Rows
from lowbit.models.runtime_ops import Clip, Matrix, RuntimeOp
from lowbit.models.shard import states_of
from lowbit.quant import weight_kernel
from lowbit.quant.format import QParams


class AffineFit:
    """Training of one block: learned tensors, loss, constraints, and folding."""

    def __init__(
        self,
        chosen: Sites,
        maps: Maps,
        clipping: Clipping,
        objective: Objective,
        schedule: Schedule,
        block: Block,
        calib: Calib,
    ) -> None:
        self.chosen, self.maps, self.clipping, self.objective = chosen, maps, clipping, objective
        if objective.inputs == "float":
            calib = replace(calib, x_q=calib.x_fp)
        self.dtype = torch.float32 if maps.precision == "float" else torch.float64
        self.mixes = learned_mixes(block, chosen, maps, self.dtype)
        block = without_choices(block, [mix.site for mix in self.mixes])
        self.schedule, self.block, self.calib = schedule, block, calib
        device = block.device
        self.run_dtype = torch.float64 if maps.precision == "double" else calib.x_q.dtype
        sites = self._sites()
        self.sites = [site for site in sites if site.leaves()]
        self.without_effect = [name for site in sites for name in _without_effect(site)]
        smooth = objective.start == "smooth"
        self.base = dict(block.params)
        if smooth:
            options = objective.init_power, objective.init_peaks
            self.base = smooth_start(block, self.sites, calib.x_fp, *options, calib.batch)
        self.flipped: dict[str, int] = {}
        if chosen.signs and smooth:
            # Not with ``given``: an earlier step's clipping ratios refer to weight ranges, which sign flips change.
            # Nor before a mix, which leaves no channel on one side.
            moved = replace(block, params=self.base)
            edges = [site.edge for site in self.sites if getattr(chosen, site.name) not in MIXES]
            self.base, self.flipped = with_signs(moved, calib.x_fp, calib.batch, edges)
        # With float64 the weights are converted once, not at every step.
        self.start = {name: value.to(self.dtype) for name, value in self.base.items()}
        given = {} if smooth else block.input_qparams
        start = replace(self._mixed_start(), input_qparams=given)
        self.inputs = LearnedInputs.of(start, calib, clipping.clip)
        learned, searched = split_by_format(block) if clipping.clip else ([], [])
        self.clips = {name: LearnedClips.of(block, name, papers=smooth) for name in learned}
        train, _ = schedule.split(len(calib.x_q))
        self.searched = SearchedClips(searched, calib, train)
        # Ratios of an earlier step are for other ranges once the smooth start has scaled the weights.
        self.kept_clips = {} if smooth else dict(block.clips)
        if smooth:
            self.searched.search(replace(start, clips={}, input_qparams=self._input_qparams()))
        else:
            self.searched.keep(block.clips)
        self.act_ratios = self._act_ratios() if clipping.act_clip else {}
        self.unit = loss_unit(calib.y_fp, objective.loss, device, calib.batch)
        augmented = [run_all(block, calib.x_q, batch=calib.batch)] if objective.aug_loss else []
        self.rows = Rows(device, calib.x_q, calib.y_fp, self.unit, *augmented)
        self.shrunk = 0

    @torch.no_grad()
    def _mixed_start(self) -> Block:
        """The block at the starting point, with its mixes."""
        params, ops = dict(self.base), dict(self.block.ops)
        for mix in self.mixes:
            ops |= mix.site.ops(mix.apply(params))
        return replace(self.block, params=params, ops=ops)

    @torch.no_grad()
    def _input_qparams(self) -> dict[str, QParams]:
        return self.inputs.qparams()

    def _sites(self) -> list[Site]:
        maps, device = self.maps, self.block.device
        kind = cast(Kind, maps.parametrisation)
        model = LearnedMap(kind, 0, 0, maps.condition, maps.mask, maps.stability, maps.block_size, self.dtype, device)
        named = [(edge, site_name(self.block, edge)) for edge in self.block.edges()]
        made = [
            make_site(self.block, edge, name, choice, model, self.chosen.shift, maps.block == "group")
            for edge, name in named
            if (choice := self.chosen.folded(name)) != "off"
        ]
        return labelled([site for site in made if site is not None])

    def _act_ratios(self) -> dict[str, LearnedRatio]:
        """One pair ``(low, high)`` per group of linears that read the same quantized input."""
        ratios: dict[str, LearnedRatio] = {}
        for group in input_groups(self.block):
            if (format := self.block.input_format(group[0])) is not None and format.clippable:
                ratios |= dict.fromkeys(group, self._act_ratio(group[0]))
        return ratios

    def _act_ratio(self, linear: str) -> LearnedRatio:
        """With ``start: given``, from what an earlier step left before the linear."""
        device = self.block.device
        if self.objective.start != "given":
            return LearnedRatio.papers((2,), device)
        op = self.block.ops.get(linear)
        return LearnedRatio.at(op.ratios.clone() if isinstance(op, Clip) else torch.ones(2, device=device))

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Learned tensors with their learning rates."""
        maps = [leaf for site in self.sites for leaf in site.leaves()]
        maps += [leaf for mix in self.mixes for leaf in mix.leaves()]
        clips = [leaf for pair in self.clips.values() for leaf in pair.leaves()]
        acts = list({id(ratio): ratio.logit for ratio in self.act_ratios.values()}.values())
        return [(maps, self.maps.lr_maps), ([*clips, *acts, *self.inputs.leaves()], self.clipping.lr_clips)]

    def begin(self, epoch: int) -> None:
        """Set the masks and the searched scales for an epoch."""
        for learned in self._maps():
            learned.begin(epoch, max(self.schedule.epochs, 1))
        self.searched.begin(epoch)

    def _maps(self) -> list[LearnedMap]:
        """All learned maps, those of mixes last."""
        return [site.map for site in self.sites] + [own for mix in self.mixes for own in mix.maps]

    def end(self) -> None:
        """After an epoch: search the scales that are not learned."""
        params, ops = self.transformed()
        self.searched.search(
            replace(
                self.block,
                params=params,
                clips=self.ratios(),
                ops={**self.block.ops, **ops},
                input_qparams=self.inputs.qparams(),
            )
        )

    def project(self) -> None:
        """Applied after each step: the condition bound, and diagonal dominance where it is enforced."""
        for learned in self._maps():
            if learned.kind in ("masked", "blocks") and self.maps.dominance == "enforce":
                learned.keep_dominant()
        found = [(learned, exceeding) for learned in self._maps() if (exceeding := learned.exceeding()) is not None]
        if not found:
            return
        # One read of the device for all maps.
        any_exceeds = torch.stack([exceeding.any() for _, exceeding in found]).tolist()
        for (learned, _), exceeds in zip(found, any_exceeds, strict=True):
            if exceeds:
                self.shrunk += learned.keep_condition()

    def transformed(self) -> tuple[dict[str, Tensor], dict[str, RuntimeOp]]:
        """Float parameters with maps folded in, and the runtime ops; differentiable."""
        return self._floats(*self._applied())

    def _floats(self, params: Params, online: Mapping[str, RuntimeOp]) -> tuple[Params, dict[str, RuntimeOp]]:
        """Both in float32, with the learned ratios of inputs."""
        ops = {name: op.float() for name, op in online.items()}
        ops |= {name: Clip(ratio.value(), self._offset(name)) for name, ratio in self.act_ratios.items()}
        return {name: value.float() for name, value in params.items()}, ops

    def _applied(self) -> tuple[Params, dict[str, RuntimeOp]]:
        """The start with maps folded in and mixes behind them, and what stays online, in the maps' own precision."""
        params, online = apply(self.block, self.sites, self.start)
        return params, self._ops(params, online)

    def _ops(self, params: Params, online: Mapping[str, Tensor]) -> dict[str, RuntimeOp]:
        """What stays online; mixes fold into ``params``."""
        ops: dict[str, RuntimeOp] = {name: Matrix(value) for name, value in online.items()}
        for mix in self.mixes:
            ops |= mix.site.ops(mix.apply(params))
        return ops

    def _offset(self, name: str) -> Tensor | None:
        """The rounding offsets that an earlier step set at a linear's input."""
        op = self.block.ops.get(name)
        return op.offset if isinstance(op, Clip) else None

    def quantized(self) -> tuple[Mapping[str, Tensor], dict[str, RuntimeOp]]:
        """The block's parameters as they are stored, and the runtime ops; differentiable."""
        if weight_kernel.within() and not self.mixes:
            linears = deferrable(self.block, self.sites, self.start)
            folded, online, maps = apply_deferring(self.block, self.sites, self.start, linears)
            params, ops = self._floats(folded, self._ops(folded, online))
            return self.block.fake_quant_clipped(params, self.ratios(), maps), ops
        params, ops = self.transformed()
        return self.block.fake_quant_clipped(params, self.ratios()), ops

    def ratios(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Clipping ratios by linear: the learned ones, the searched ones, and those of earlier steps."""
        return {**self.kept_clips, **self.searched.now, **{name: pair.values() for name, pair in self.clips.items()}}

    def loss(self, indices: Tensor) -> Tensor:
        """The block's output error on the sequences ``indices``, relative to the float output's mean square."""
        params, ops = self.quantized()
        x, y_fp, unit, *augmented = self.rows(indices)
        # On a GPU the block may run in 16 bits; maps, quantizers and the loss stay in float32 or above.
        block = replace(self.block, ops={**self.block.ops, **ops}, input_qparams=self.inputs.qparams())
        y = run(block, x.to(self.run_dtype), params, quantized=True)
        error = relative_loss(y, y_fp, unit)
        for y_aug in augmented:
            error = error + self.objective.aug_loss * relative_loss(y, y_aug, unit)
        return error

    @torch.no_grad()
    def fold(self, fitted: Fitted) -> Block:
        """The block with everything folded in, by the function and in the precision that training uses."""
        params, ops = self.transformed()
        ops = {name: op.to(self.block.device) for name, op in ops.items()}
        done = replace(
            self.block,
            params=params,
            clips=self.ratios(),
            input_qparams=self.inputs.qparams(),
            ops={**self.block.ops, **ops},
            pictures={**self.block.pictures, **self.pictures()},
        )
        return done.with_notes("affinequant", *self._notes(fitted)).with_record(
            "affinequant", self.record(done, fitted)
        )

    def record(self, done: Block, fitted: Fitted) -> dict[str, Any]:
        """Figures for the report: losses, the maps' condition numbers and margins, and the error of folding."""
        first = torch.arange(min(2, len(self.calib.x_fp)))
        x_fp, y_fp = (states_of(x, first).to(self.block.device) for x in (self.calib.x_fp, self.calib.y_fp))
        sites = {}
        for site in self.sites:
            entry: dict[str, Any] = {"map": site.map.kind, "condition": float(site.map.conditions().max())}
            if self.maps.dominance != "off" and site.map.is_matrix:
                entry["margin"] = float(site.map.margins().min())
            if (flips := self.flipped.get(site.edge.src.module)) is not None:
                entry["turned_over"] = flips
            sites[_key(site)] = entry
        sites |= {_mix_key(mix): self._mix_record(mix) for mix in self.mixes}
        return {
            "loss": fitted.train,
            "held_out": [value if math.isfinite(value) else None for value in fitted.held_out],
            "best_epoch": fitted.best,
            "skipped_steps": fitted.skipped,
            "pulled_to_condition": self.shrunk,
            "merge_error": relative_error(run_all(done, x_fp), y_fp),
            "merge_error_before_cast": self._error_before_cast(x_fp[:1].double()),
            "sites": sites,
            "without_effect": self.without_effect,
        }

    def _mix_record(self, mix: LearnedMix) -> dict[str, Any]:
        entry: dict[str, Any] = {"map": mix.choice, "condition": mix.condition()}
        if self.maps.dominance != "off" and mix.maps:
            entry["margin"] = min(float(own.margins().min()) for own in mix.maps)
        return entry

    def _error_before_cast(self, x: Tensor) -> float:
        """The relative squared error that the maps alone cause, in their own precision, for hidden states in float64.

        Weights and matrices are taken as ``apply`` returns them, before they are cast to float32 for quantization
        and storage: this is the error of computing and applying inverses.
        """
        params, online = self._applied()
        ops = {**self.block.ops, **online}
        exact = run(self.block, x, {name: value.double() for name, value in self.base.items()})
        moved = run(replace(self.block, ops=ops), x, {name: value.double() for name, value in params.items()})
        return relative_error(moved, exact)

    def pictures(self) -> dict[str, Tensor]:
        """The learned matrices, reduced to a size that a report can show."""
        keys = [(_key(site).partition("."), site.map) for site in self.sites if site.map.is_matrix]
        keys += [(_mix_key(mix).partition("."), own) for mix in self.mixes for own in mix.maps[:1]]
        step = self.block.record_key("affinequant")
        return {f"{index}.{step}.{name}": learned.picture() for (index, _, name), learned in keys}

    def _notes(self, fitted: Fitted) -> list[str]:
        notes = list(fitted.notes)
        if self.schedule.epochs and not fitted.best:
            notes.append("no epoch improves the validation loss; the starting point is kept")
        if self.shrunk:
            notes.append(f"{self.shrunk} map updates were reduced to the condition bound {self.maps.condition:g}")
        if self.chosen.qk == "matrix" and any(site.edge.gains for site in self.sites):
            notes.append("q and k have norms: only a diagonal tied within rotary pairs folds there")
        return notes + self._limited()

    def _limited(self) -> list[str]:
        """Where an edge folds less than the options ask for."""
        notes = []
        for edge in self.block.edges():
            name = site_name(self.block, edge)
            choice = self.chosen.folded(name)
            if choice == "off" or edge.gains or (edge.kind == "channels" and edge.scales):
                continue
            kind = map_kind(edge, choice, cast(Kind, self.maps.parametrisation))
            if kind is None:
                notes.append(f"{edge.src.module}: only rotations fold there, so no scales are learned")
            elif choice == "matrix" and kind == "diagonal":
                notes.append(f"{edge.src.module}: only a diagonal folds there, so no matrix is learned")
            elif kind in ("turn", "orthogonal"):
                notes.append(f"{edge.src.module}: only rotations fold there")
        return notes


def _key(site: Site) -> str:
    """The layer's index and the site's label: ``7.heads``."""
    return f"{site.edge.src.module.partition('.')[0]}.{site.label or site.name}"


def _mix_key(mix: LearnedMix) -> str:
    """``7.channels-kronecker``."""
    return f"{mix.site.layer}.{mix.label}"


def _without_effect(site: Site) -> list[str]:
    """What of a site is not trained: ``7.qk`` for all of it, ``7.qk.log`` for a part."""
    return [f"{_key(site)}.{name}" for name in site.without_effect] if site.leaves() else [_key(site)]
