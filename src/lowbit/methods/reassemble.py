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
from lowbit.methods.layer_by_layer import layer_by_layer
from lowbit.methods.method import Method, Needs
from lowbit.methods.offsets import OFFSETS, with_offsets
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.scoring import output_error
from lowbit.methods.statistics import input_statistics
from lowbit.models.architecture import Edge, Projection
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import Clip, Gather, Matrix, RuntimeOp
from lowbit.quant.activations import ActFormat

SITES = {"down": ("channels",), "norms": ("norm",), "all": ("channels", "norm")}  # which kinds of edge
PEAKS = {"absolute": "peak", "relative": "crest"}  # which figures
THETAS = ("search", "most")
CHOICES = {"sites": tuple(SITES), "peaks": tuple(PEAKS), "tokens": tuple(GRAMS), "offsets": OFFSETS}


@dataclass(frozen=True)
class Reassemble(Method):
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
        tokens: ``normalized`` weighs every token alike when channels are dropped, ``unweighted`` by its square.
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
    tokens: str = "normalized"
    offsets: str = "none"
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "both"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = False
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 6

    def __post_init__(self) -> None:
        check_choices("reassemble", self, CHOICES)
        check_assembly(self.assembly, self.sites)
        if isinstance(self.theta, str) and self.theta not in THETAS:
            raise unknown("reassemble.theta", self.theta, THETAS)
        if not isinstance(self.theta, str) and self.theta <= 0:
            raise LowbitError(f"reassemble: theta {self.theta:g} given; allowed: above 0, {' or '.join(THETAS)}")
        counts = dict.fromkeys(("grid", "tries", "sequences"), "1 or more")
        check_bounds("reassemble", self, {"most": "above 0 and at most 0.5", "damping": "above 0", **counts})

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """A gather behind norms, where such sites are asked for; a clip with offsets where inputs take them."""
        ops: set[type[RuntimeOp]] = set()
        if "norm" in SITES[self.sites]:
            ops.add(Gather)
        if self.offsets == "both" and inputs is not None and inputs.clippable:
            ops.add(Clip)
        return frozenset(ops)

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with channels reassembled where that lowers its layer's error, or where ``theta`` says so."""
        return layer_by_layer(self._layer, block, calib) if block.formats else block

    def _layer(self, layer: Block, calib: Calib) -> Block:
        for edge in layer.edges():
            if edge.kind in SITES[self.sites] and all(dst.module in layer.formats for dst in edge.readers):
                layer = self._edge(layer, edge, calib)
        return layer

    def _edge(self, block: Block, edge: Edge, calib: Calib) -> Block:
        readers = [dst.module for dst in edge.readers]
        peak, gram = self._moments(block, readers[0], calib)
        candidates, notes = self._candidates(peak, readers[0])
        weight = torch.cat([block.weight(name) for name in readers])
        # Those that the largest candidate splits are never dropped: then the candidates' drops are one sequence.
        keep = candidates[-1] > 1 if candidates else torch.zeros_like(peak, dtype=torch.bool)
        merges = edge.kind == "norm" and self.assembly != "drop"
        plan = self._plan(weight, gram, keep, merges)
        del gram  # the plan has taken what it needs
        best, kept, theta = block, 0, None
        scores = {0: output_error(block, calib, self.sequences)}
        for copies in candidates:
            extra = int((copies - 1).sum())
            if isinstance(plan, MergePlan) and extra > plan.most:
                break
            made = plan.without(extra, copies)
            tried = with_offsets(fold(block, edge, *made), readers, made[0], copies, self.offsets)
            scores[extra] = output_error(tried, calib, self.sequences)
            if self.theta != "search" or scores[extra] < scores[kept]:
                best, kept, theta = tried, extra, float((peak / copies)[copies > 1].max())
        figures: dict[str, Any] = {"copies": kept, "scores": {str(k): v for k, v in scores.items()}}
        figures["assembly"] = self.assembly if merges else "drop"
        if theta is not None:
            figures["theta"] = theta
        before = block.record.get(block.start, {}).get("reassemble", {})
        return best.with_notes("reassemble", *notes).with_record("reassemble", {**before, readers[0]: figures})

    def _moments(self, block: Block, linear: str, calib: Calib) -> tuple[Tensor, Tensor]:
        """What is compared with theta, ``(channels,)``, and the second moments ``(channels, channels)`` float64."""
        gram, figure = GRAMS[self.tokens], PEAKS[self.peaks]
        seen = input_statistics(block, calib.x_fp, [linear], (gram, figure), batch=calib.batch)[linear]
        peak = seen["peak"] if self.peaks == "absolute" else (seen["crest"] / seen.count).pow(1 / 8)
        return peak, seen[gram].double()

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
        note = f"{linear}: theta {self.theta:g} would add {extra} copies, more than {self.most:.1%}"
        return counts[-1:], [f"{note} of the channels; {int((counts[-1] - 1).sum()) if counts else 0} were added"]

    def _plan(self, weight: Tensor, gram: Tensor, keep: Tensor, merges: bool) -> DropPlan | MergePlan:
        if merges:
            return MergePlan(weight, gram, keep, self.assembly == "one-to-one")
        return DropPlan(weight, gram, self.damping, keep)


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
    params, clips, ops = dict(block.params), dict(block.clips), dict(block.ops)
    if isinstance(edge.src, Projection):
        assert into is None, "a mean of products does not fold"
        _gather(params, clips, edge.src, idx, divisor)
        if edge.partner is not None:
            _gather(params, clips, edge.partner, idx, torch.ones_like(divisor))
    else:
        ops[edge.src.module] = gather_behind(ops.get(edge.src.module), idx, divisor, into)
    readers = [dst.module for dst in edge.readers]
    rows = [block.weight(name).shape[0] for name in readers]
    for name, part in zip(readers, weight[:, idx].split(rows), strict=True):
        params[f"{name}.weight"] = part.to(params[f"{name}.weight"].dtype).contiguous()
        if name in clips and clips[name][0].shape[-1] > 1:
            del clips[name]  # found for groups of channels that are no more
    return replace(block, params=params, clips=clips, ops=ops)


def gather_behind(op: RuntimeOp | None, idx: Tensor, divisor: Tensor, into: Tensor | None = None) -> RuntimeOp:
    """What runs behind a norm: the gather; or the matrix that stands there, with its columns gathered so."""
    gather = Gather(idx, (1 / divisor).float(), into)
    if op is None:
        return gather
    if not isinstance(op, Matrix):
        raise LowbitError("reassemble: the channels after this norm are reassembled already; leave one such step out")
    return Matrix(gather(op.matrix))


def _gather(
    params: dict[str, Tensor],
    clips: dict[str, tuple[Tensor, Tensor]],
    projection: Projection,
    idx: Tensor,
    divisor: Tensor,
) -> None:
    """Rows of a projection's weight, bias and clips in the new order, weight and bias over ``divisor``."""

    def gathered(rows: Tensor) -> Tensor:
        scale = divisor.double().reshape(-1, *[1] * (rows.ndim - 1))
        return (rows[idx] / scale).to(rows.dtype)

    count = params[projection.parameter].shape[0]
    projection.change(params, gathered)
    name = projection.module
    if name in clips and clips[name][0].shape[0] == count:
        order = torch.arange(count, device=idx.device)
        order[projection.rows] = order[projection.rows][idx]
        low, high = clips[name]
        clips[name] = (low[order], high[order])
