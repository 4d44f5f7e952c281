"""Channel reassembly: outlier channels before a linear are taken apart, and others dropped to make room for them.

Source: QLLM, Liu et al., ICLR 2024, arXiv 2310.08041, section 3.2. A channel whose largest value exceeds ``theta``
becomes ``T = ceil(max / theta)`` copies of ``x / T`` that share its weight column; in floating point that changes
nothing: ``sum_t (x / T) w = x w``. The other channels are then rounded with a step that the outlier no longer sets.

Where the channels are those between up and down, everything folds: gate rows are repeated, up rows repeated and
divided by ``T`` (fc1's likewise: a ReLU passes the factor through), down columns repeated. To keep the width, as many
channels are dropped as copies are added, each with the weights' best answer to its absence: see ``dropping.py``. The
paper averages pairs of channels instead, which cannot fold here: a mean of products is no product of means.

After a norm (``sites: all``) nothing takes up the new order, since the residual stream is everyone's: the norm's
output is gathered, ``x[idx] / T``, which stays online. The norm itself is over the original channels. There the
paper's assembly is possible too: see ``assembly.py``.

``theta`` is searched for each layer on a grid, downwards from the largest value (the paper's grid), by the error of
the layer's own output with the quantizers on; "nothing" is always a candidate, and what is scored is what is applied.

Of ``channels x channels`` matrices no more than two are held at any time: the second moments and a batch's share,
then they and their Cholesky factor, and from there on the inverse alone. Candidates hold weights only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.errors import LowbitError, unknown
from lowbit.methods.assembly import MergePlan, check_assembly
from lowbit.methods.dropping import DropPlan
from lowbit.methods.gptq import GRAMS
from lowbit.methods.offsets import OFFSETS, with_offsets
from lowbit.methods.rtn import RTN
from lowbit.methods.statistics import input_moments
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.architecture import Edge, Part, Ref, module_of
from lowbit.models.block import Block, Calib, apply_online, part_of, recorded, run_all
from lowbit.models.equivalence import rows_of
from lowbit.quant.scheme import Scheme

SITES = {"down": ("channels",), "norms": ("norm",), "all": ("channels", "norm")}  # which kinds of edge
PEAKS = {"absolute": "peak", "relative": "crest"}  # which moments
THETAS = ("search", "most")


@dataclass(frozen=True)
class Reassemble:
    """Disassembly of outlier channels at unchanged widths.

    Attributes:
        sites: ``down``: before down_proj, folded into gate, up and down, so that the graph stays as it is; ``norms``:
            after the norms, where a gather stays online; ``all``: both.
        assembly: how room is made after norms: ``drop`` with compensation, or merging by ``bipartite`` matching (the
            paper's) or ``one-to-one``. Before down_proj channels are always dropped; the record says which it was.
        theta: ``search``: for each layer by its error, nothing being a candidate. The others take what they are told
            to, helpful or not: ``most``, in every layer as many copies as that allows (the paper's fixed ratios); a
            number, one threshold for all layers, in the units of ``peaks``, raised with a note where it would take
            more than ``most``.
        most: largest share of the channels that copies may add (and drops take away).
        grid: thetas between the largest value and 0, equally spaced.
        tries: how many different numbers of copies are scored, spread over those that the grid gives.
        sequences: calibration sequences that score a candidate.
        damping: share of the mean of the second moments' diagonal that is added to it.
        peaks: what is compared with theta. ``absolute``: each channel's largest value, the paper's. ``relative``:
            the eighth-power mean of the values over their tokens' root mean squares. Ranges are found for each token,
            so a channel matters where it stands out in its token; one massive token decides the absolute maxima of
            channels that are small everywhere else, and their copies are wasted.
        tokens: ``even`` weighs every token alike when channels are dropped, ``all`` by its square.
        offsets: copies round to different codes: ``none``, ``weights`` (folded) or ``both``, where one constant for
            each channel of the linears' inputs stays online; see ``offsets.py``.
    """

    sites: str = "down"
    assembly: str = "drop"
    theta: str | float = "search"
    most: float = 0.05
    grid: int = 200
    tries: int = 8
    sequences: int = 4
    damping: float = 0.01
    peaks: str = "absolute"
    tokens: str = "even"
    offsets: str = "none"
    rounds: ClassVar[bool] = False
    corrects: ClassVar[bool] = True
    passes: ClassVar[int] = 6

    def __post_init__(self) -> None:
        if self.sites not in SITES:
            raise unknown("reassemble.sites", self.sites, tuple(SITES))
        check_assembly(self.assembly, self.sites)
        if isinstance(self.theta, str) and self.theta not in THETAS:
            raise unknown("reassemble.theta", self.theta, THETAS)
        if not isinstance(self.theta, str) and self.theta <= 0:
            raise LowbitError(f"reassemble: theta {self.theta:g} given; allowed: above 0, {' or '.join(THETAS)}")
        if self.peaks not in PEAKS:
            raise unknown("reassemble.peaks", self.peaks, tuple(PEAKS))
        if self.tokens not in GRAMS:
            raise unknown("reassemble.tokens", self.tokens, tuple(GRAMS))
        if self.offsets not in OFFSETS:
            raise unknown("reassemble.offsets", self.offsets, OFFSETS)
        if not 0 < self.most <= 0.5 or min(self.grid, self.tries, self.sequences) < 1 or self.damping <= 0:
            raise LowbitError(
                "reassemble: most must be above 0 and at most 0.5, grid, tries and sequences 1 or more, damping "
                "above 0"
            )

    def __call__(self, block: Block, calib: Calib, scheme: Scheme) -> Block:
        """The block with channels reassembled where that lowers its layer's error, or where ``theta`` says so."""
        if all(block.weight_spec(name, scheme) is None for name in block.linears()):
            return block
        done, x_fp, x_q = block, calib.x_fp, calib.x_q
        for i in range(len(block.layers)):
            layer = part_of(done, i, i + 1)
            y_fp = run_all(part_of(block, i, i + 1), x_fp, batch=calib.batch)
            for edge in layer.edges():
                here = edge.kind in SITES[self.sites]
                if here and all(layer.weight_spec(module_of(dst), scheme) is not None for dst in edge.dst):
                    layer = self._layer(layer, edge, Calib(x_fp, x_q, y_fp, calib.batch), scheme)
            rounded = RTN()(layer, calib, scheme)
            x_fp, x_q = y_fp, run_all(rounded, x_q, rounded.quantized_params(), scheme, batch=calib.batch)
            others = {name: clip for name, clip in done.clips.items() if not name.startswith(f"{layer.start}.")}
            done = replace(
                done,
                params={**done.params, **layer.params},
                clips={**others, **layer.clips},
                online={**done.online, **layer.online},
                notes=(*done.notes, *layer.notes),
                record={**done.record, **layer.record},
            )
        return done

    def _layer(self, block: Block, edge: Edge, calib: Calib, scheme: Scheme) -> Block:
        readers = [module_of(dst) for dst in edge.dst]
        peak, gram = self._moments(block, readers[0], calib)
        candidates, notes = self._candidates(peak, readers[0])
        weight = torch.cat([block.weight(name) for name in readers])
        # Those that the largest candidate splits are never dropped: then the candidates' drops are one sequence.
        keep = candidates[-1] > 1 if candidates else torch.zeros_like(peak, dtype=torch.bool)
        merges = edge.kind == "norm" and self.assembly != "drop"
        plan = self._plan(weight, gram, keep, merges)
        del gram  # the plan has taken what it needs
        best, kept, theta = block, 0, None
        scores = {0: self._score(block, calib, scheme)}
        for copies in candidates:
            extra = int((copies - 1).sum())
            if isinstance(plan, MergePlan) and extra > plan.most:
                break
            made = plan.without(extra, copies)
            tried = with_offsets(fold(block, edge, *made), readers, made[0], copies, scheme, self.offsets)
            scores[extra] = self._score(tried, calib, scheme)
            if self.theta != "search" or scores[extra] < scores[kept]:
                best, kept, theta = tried, extra, float((peak / copies)[copies > 1].max())
        figures: dict[str, Any] = {"copies": kept, "scores": {str(k): v for k, v in scores.items()}}
        figures["assembly"] = self.assembly if merges else "drop"
        if theta is not None:
            figures["theta"] = theta
        before = block.record.get(block.start, {}).get("reassemble", {})
        record = recorded(block, "reassemble", {**before, readers[0]: figures})
        return replace(best, notes=(*block.notes, *notes), record=record)

    def _moments(self, block: Block, linear: str, calib: Calib) -> tuple[Tensor, Tensor]:
        """What is compared with theta, ``(channels,)``, and the second moments ``(channels, channels)`` float64."""
        want = (GRAMS[self.tokens], PEAKS[self.peaks])
        moments = input_moments(block, calib.x_fp, [linear], want, batch=calib.batch)[linear]
        peak = moments.peak if self.peaks == "absolute" else (moments.crest / moments.tokens).pow(1 / 8)
        return peak, getattr(moments, GRAMS[self.tokens]).double()

    def _candidates(self, peak: Tensor, linear: str) -> tuple[list[Tensor], list[str]]:
        """Numbers of copies in rising order of their totals, at most one unless theta is searched; and notes."""
        counts = candidate_counts(peak, self.most, self.grid)
        if self.theta == "search":
            some = torch.linspace(0, len(counts) - 1, min(self.tries, len(counts))).long().unique()
            return [counts[i] for i in some.tolist()], []
        if isinstance(self.theta, str):
            return counts[-1:], []
        copies = copies_over(peak, self.theta)
        extra = int((copies - 1).sum())
        if extra <= self.most * len(peak):
            return [copies] if extra else [], []
        note = f"reassemble: {linear}: theta {self.theta:g} would add {extra} copies, more than {self.most:.1%}"
        return counts[-1:], [f"{note} of the channels; {int((counts[-1] - 1).sum()) if counts else 0} were added"]

    def _plan(self, weight: Tensor, gram: Tensor, keep: Tensor, merges: bool) -> DropPlan | MergePlan:
        if merges:
            return MergePlan(weight, gram, keep, self.assembly == "one-to-one")
        return DropPlan(weight, gram, self.damping, keep)

    def _score(self, block: Block, calib: Calib, scheme: Scheme) -> float:
        """The rounded layer's error, each token relative to its float output."""
        x, wanted = (stream[: self.sequences].to(block.device) for stream in (calib.x_q, calib.y_fp))
        rounded = RTN()(block, calib, scheme)
        y = run_all(rounded, x, rounded.quantized_params(), scheme, batch=calib.batch)
        return float(relative_loss(y, wanted, loss_unit(wanted, "token")))


def candidate_counts(peak: Tensor, most: float, grid: int) -> list[Tensor]:
    """Numbers of copies ``(channels,)`` for falling thetas, one for each different total; at least one copy is added.

    Args:
        peak: largest absolute value of each channel.
        most: largest share of channels that copies may add.
        grid: thetas between the largest peak and 0.

    >>> [t.tolist() for t in candidate_counts(torch.tensor([4.0, 1.0, 1.0, 1.0]), 0.5, 8)]
    [[2, 1, 1, 1], [3, 1, 1, 1]]
    """
    found: dict[int, Tensor] = {}
    top = float(peak.max())
    for step in range(1, grid):
        theta = top * (1 - step / grid)
        copies = copies_over(peak, theta)
        extra = int((copies - 1).sum())
        if extra > most * len(peak):
            break
        if extra:
            found.setdefault(extra, copies)
    return list(found.values())


def copies_over(peak: Tensor, theta: float) -> Tensor:
    """``max(1, ceil(peak / theta))`` ``(channels,)``.

    >>> copies_over(torch.tensor([4.0, 1.0, 0.5]), 1.5).tolist()
    [3, 1, 1]
    """
    return (peak / theta).ceil().clamp(min=1).long()


def gate_of(block: Block, src: Ref) -> Ref | None:
    """What multiplies ``src`` before the linear behind it: the other one that reads the same input, if any."""
    if isinstance(src, Part):
        return Part(src.module, "gate")
    group = next(group for group in block.linear_groups() if src in group)
    others = [name for name in group if name != src]
    return others[0] if others else None


def fold(block: Block, edge: Edge, idx: Tensor, divisor: Tensor, weight: Tensor, into: Tensor | None = None) -> Block:
    """The block with the channels between ``edge.src`` and its readers in a new order, some of them repeated.

    Args:
        block: one layer.
        edge: a ``channels`` edge, which folds, or a ``norm`` edge, where a gather stays online.
        idx: for each new channel the old one.
        divisor: for each new channel the number of its copies, or of the channels of which it is the mean.
        weight: the readers' weights ``(out, channels)``, one below the other, compensated for what went, in the old
            order.
        into: for each old channel the new one that it is merged into, or -1; after norms only.
    """
    params, clips, online = dict(block.params), dict(block.clips), dict(block.online)
    if edge.kind == "norm":
        online[module_of(edge.src)] = gather_after(online.get(module_of(edge.src)), idx, divisor, into)
    else:
        assert into is None, "a mean of products does not fold"
        gate = gate_of(block, edge.src)
        _gather(block, params, clips, edge.src, idx, divisor)
        if gate is not None:
            _gather(block, params, clips, gate, idx, torch.ones_like(divisor))
    readers = [module_of(dst) for dst in edge.dst]
    rows = [block.weight(name).shape[0] for name in readers]
    for name, part in zip(readers, weight[:, idx].split(rows), strict=True):
        params[f"{name}.weight"] = part.to(params[f"{name}.weight"].dtype).contiguous()
        if name in clips and clips[name][0].shape[-1] > 1:
            del clips[name]  # found for groups of channels that are no more
    return replace(block, params=params, clips=clips, online=online)


def gather_after(map: Tensor | None, idx: Tensor, divisor: Tensor, into: Tensor | None = None) -> Tensor:
    """What runs after a norm: see ``Block.online``; or the matrix that ran there with its columns gathered so."""
    rows = [idx.to(torch.float32), (1 / divisor).float()]
    gather = torch.stack(rows if into is None else [*rows, into.to(torch.float32)])
    if map is None:
        return gather
    if map.shape[0] in (2, 3):
        raise LowbitError("reassemble: the channels after this norm are reassembled already; leave one such step out")
    return apply_online(map, gather)


def _gather(
    block: Block,
    params: dict[str, Tensor],
    clips: dict[str, tuple[Tensor, Tensor]],
    ref: Ref,
    idx: Tensor,
    divisor: Tensor,
) -> None:
    """Rows of a linear's weight, bias and clips in the new order, weight and bias over ``divisor``."""
    name = module_of(ref)
    whole = params[f"{name}.weight"]
    rows = rows_of(ref, block.heads, whole.shape[0])
    order = torch.arange(whole.shape[0], device=whole.device)
    order[rows] = order[rows][idx]
    scale = torch.ones(whole.shape[0], dtype=torch.float64, device=whole.device)
    scale[rows] = divisor
    params[f"{name}.weight"] = (whole[order] / scale[:, None]).to(whole.dtype)
    if f"{name}.bias" in params:
        bias = params[f"{name}.bias"]
        params[f"{name}.bias"] = (bias[order] / scale).to(bias.dtype)
    if name in clips:
        low, high = clips[name]
        if low.shape[0] == whole.shape[0]:
            clips[name] = (low[order], high[order])
