"""Channel reassembly: splits the outlier channels before a linear and drops or merges others to keep the width.

Source: QLLM, Liu et al., ICLR 2024, arXiv 2310.08041, section 3.2. A channel whose largest value exceeds ``theta``
becomes ``T = ceil(max / theta)`` copies of ``x / T`` that share its weight column. The float function is unchanged,
``sum_t (x / T) w = x w``, and the outlier no longer determines the quantization step of the other channels.

Between up and down everything folds: gate rows are repeated, up rows repeated and divided by ``T`` (fc1's too: a ReLU
commutes with a positive factor), down columns repeated. To keep the width, as many channels are dropped as
copies are added, with compensation in the remaining columns (``dropping.py``). The paper averages pairs of channels
instead, which cannot fold here: a mean of products is not a product of means.

After a norm (``sites: all``) the reordering does not fold, because all layers share the residual stream: the norm's
output is gathered, ``x[idx] / T``, which stays online. The norm itself covers the original channels. The paper's
assembly is available there (``assembly.py``).

``theta`` is searched for each layer on a grid, downwards from the largest value (the paper's grid), by the layer's
output error with quantizers enabled. No reassembly is always a candidate, and the scored weights are those applied.

Memory: at most two ``channels x channels`` matrices at any time: the second moments and a batch's contribution, then
the second moments and their Cholesky factor, then the inverse alone. Candidates hold weights only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lowbit.errors import LowbitError, unknown
from lowbit.methods.assembly import MergePlan, check_assembly
from lowbit.methods.damping import damping_of
from lowbit.methods.dropping import DropPlan
from lowbit.methods.gptq import GRAMS
from lowbit.methods.input_ranges import without_input_ranges
from lowbit.methods.layer_by_layer import layer_by_layer
from lowbit.methods.method import Method, Needs
from lowbit.methods.offsets import OFFSETS, with_offsets
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.scoring import output_error
from lowbit.methods.statistics import input_statistics
from lowbit.models.block import Block, Calib
from lowbit.models.edges import Edge, Projection
from lowbit.models.equivalence import op_between
from lowbit.models.runtime_ops import Clip, Gather, Matrix, RuntimeOp, linear_behind
from lowbit.quant.activations import ActFormat

SITES = {"down": ("channels",), "norms": ("norm",), "all": ("channels", "norm")}  # ``sites`` -> kinds of edge
PEAKS = {"absolute": "peak", "relative": "crest"}  # ``peaks`` -> figure of ``statistics.py``
THETAS = ("search", "most")
CHOICES = {"sites": tuple(SITES), "peaks": tuple(PEAKS), "tokens": tuple(GRAMS), "offsets": OFFSETS}


@dataclass(frozen=True)
class Reassemble(Method):
    """Splitting of outlier channels at unchanged widths.

    Attributes:
        sites: ``down``: before down_proj, folded into gate, up and down, so that the graph is unchanged; ``norms``:
            after the norms, where a gather stays online; ``all``: both.
        assembly: how channels are removed after norms: ``drop`` with compensation, or merging by ``bipartite``
            matching (the paper's) or ``one-to-one``. Before down_proj channels are always dropped; the record states
            which applies.
        theta: ``search``: per layer, by the layer's error, with no reassembly as a candidate. The others apply
            without a comparison: ``most``, as many copies in every layer as the option ``most`` allows (the paper's
            fixed ratios); a number, one threshold for all layers, in the units of ``peaks``, raised with a note where
            it requires more copies than ``most``.
        most: largest share of the channels that copies may add (and that are removed).
        grid: thresholds between the largest value and 0, equally spaced.
        tries: different numbers of copies that are scored, evenly spread over those of the grid.
        sequences: calibration sequences that score a candidate.
        damping: added to the diagonal of the second moments, as a share of the diagonal's mean.
        shrinkage: this times the channels over the calibration tokens is added to ``damping``, see ``damping.py``.
        peaks: the statistic that is compared with theta. ``absolute``: each channel's largest value (the paper's).
            ``relative``: the eighth-power mean of the values over their tokens' root mean squares. Activation ranges
            are per token, so a channel matters where it stands out in its token; a single massive token can determine
            the absolute maximum of a channel that is small everywhere else, whose copies are then wasted.
        tokens: second moments for dropping: of per-token ``normalized`` or of ``unweighted`` inputs.
        offsets: rounding offsets between copies: ``none``, ``weights`` (folded) or ``both``, with one constant per
            channel of the linears' inputs that stays online; see ``offsets.py``.
    """

    sites: str = "down"
    assembly: str = "drop"
    theta: str | float = "search"
    most: float = 0.05
    grid: int = 200
    tries: int = 8
    sequences: int = 4
    damping: float = 0.01
    shrinkage: float = 1.0
    peaks: str = "absolute"
    tokens: str = "normalized"
    offsets: str = "none"
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "both"
    closed_form: ClassVar[bool] = True
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
        bounds = {"most": "above 0 and at most 0.5", "damping": "above 0", "shrinkage": "0 or more", **counts}
        check_bounds("reassemble", self, bounds)

    def folded(self) -> Self | None:
        """Reassembly before down_proj alone; offsets fold into biases or are left out."""
        offsets = "weights" if self.offsets == "both" else self.offsets
        if "channels" not in SITES[self.sites]:
            return None
        return replace(self, sites="down", assembly="drop", offsets=offsets)

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """A gather after norms if ``sites`` has them; a clip with offsets if the input format supports it."""
        ops: set[type[RuntimeOp]] = set()
        if "norm" in SITES[self.sites]:
            ops.add(Gather)
        if self.offsets == "both" and inputs is not None and inputs.clippable:
            ops.add(Clip)
        return frozenset(ops)

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with channels reassembled where that lowers the layer's error, or as a fixed ``theta`` says."""
        # Stored ranges are those of channels that are about to change.
        return layer_by_layer(self._layer, without_input_ranges(block), calib) if block.formats else block

    def _layer(self, layer: Block, calib: Calib) -> Block:
        figures: dict[str, Any] = {}
        for edge in layer.edges():
            if edge.kind in SITES[self.sites] and _gathers(layer, edge):
                first = edge.readers[0].module
                if (kind := _mixed_by(layer, edge)) is not None:
                    text = f"a {kind} mixes what {first} reads, where no channel stands out: none is reassembled"
                    layer = layer.with_notes("reassemble", text)
                    continue
                layer, figures[first] = self._edge(layer, edge, calib)
        return layer.with_record("reassemble", figures) if figures else layer

    def _edge(self, block: Block, edge: Edge, calib: Calib) -> tuple[Block, dict[str, Any]]:
        """The block with an edge's channels reassembled, and the figures for the report."""
        readers = [dst.module for dst in edge.readers]
        peak, gram, tokens = self._moments(block, readers[0], calib)
        candidates, notes = self._candidates(peak, readers[0])
        weight = torch.cat([block.weight(name) for name in readers])
        # Channels that the largest candidate splits are never dropped, so that all candidates share one sequence.
        keep = candidates[-1] > 1 if candidates else torch.zeros_like(peak, dtype=torch.bool)
        merges = edge.kind == "norm" and self.assembly != "drop"
        plan = self._plan(weight, gram, tokens, keep, merges)
        del gram  # frees memory: the plan holds what it needs
        best, best_extra, theta = block, 0, None
        scores = {0: output_error(block, calib, self.sequences)}
        for copies in candidates:
            extra = int((copies - 1).sum())
            if isinstance(plan, MergePlan) and extra > plan.most:
                break
            arrangement = plan.without(extra, copies)
            candidate = with_offsets(fold(block, edge, *arrangement), readers, arrangement[0], copies, self.offsets)
            scores[extra] = output_error(candidate, calib, self.sequences)
            if self.theta != "search" or scores[extra] < scores[best_extra]:
                best, best_extra, theta = candidate, extra, float((peak / copies)[copies > 1].max())
        figures: dict[str, Any] = {"copies": best_extra, "scores": {str(k): v for k, v in scores.items()}}
        figures["assembly"] = self.assembly if merges else "drop"
        if theta is not None:
            figures["theta"] = theta
        return best.with_notes("reassemble", *notes), figures

    def _moments(self, block: Block, linear: str, calib: Calib) -> tuple[Tensor, Tensor, int]:
        """What theta is compared with ``(channels,)``, second moments ``(channels, channels)``, their tokens."""
        gram, figure = GRAMS[self.tokens], PEAKS[self.peaks]
        seen = input_statistics(block, calib.x_fp, [linear], (gram, figure), batch=calib.batch)[linear]
        peak = seen["peak"] if self.peaks == "absolute" else (seen["crest"] / seen.count).pow(1 / 8)
        return peak, seen[gram].double(), seen.count

    def _candidates(self, peak: Tensor, linear: str) -> tuple[list[Tensor], list[str]]:
        """Candidates, by increasing total of copies (at most one unless theta is searched), and notes."""
        counts = candidate_counts(peak, self.most, self.grid)
        if self.theta == "search":
            selected = torch.linspace(0, len(counts) - 1, min(self.tries, len(counts))).long().unique()
            return [counts[i] for i in selected.tolist()], []
        if isinstance(self.theta, str):
            return counts[-1:], []
        copies = copies_over(peak, self.theta)
        extra = int((copies - 1).sum())
        if extra <= self.most * len(peak):
            return [copies] if extra else [], []
        note = f"{linear}: theta {self.theta:g} requires {extra} copies, more than {self.most:.1%}"
        return counts[-1:], [f"{note} of the channels; {int((counts[-1] - 1).sum()) if counts else 0} are added"]

    def _plan(self, weight: Tensor, gram: Tensor, tokens: int, keep: Tensor, merges: bool) -> DropPlan | MergePlan:
        if merges:
            return MergePlan(weight, gram, keep, self.assembly == "one-to-one")
        return DropPlan(weight, gram, damping_of(self.damping, self.shrinkage, len(gram), tokens), keep)


def _gathers(layer: Block, edge: Edge) -> bool:
    """Whether channels may be reindexed at the edge, all readers of which are quantized."""
    return edge.gathers and all(dst.module in layer.formats for dst in edge.readers)


def _mixed_by(layer: Block, edge: Edge) -> str | None:
    """The kind of the op that mixes an edge's channels before they are read; not a matrix that takes a gather."""
    if (name := op_between(layer, edge)) is None:
        return None
    op = layer.ops[name]
    takes_gather = linear_behind(name) is None and isinstance(op, Matrix)
    return op.kind if op.on_inputs and not takes_gather else None


def candidate_counts(peak: Tensor, most: float, grid: int) -> list[Tensor]:
    """Numbers of copies ``(channels,)`` for decreasing thetas, one per different total of at least one copy.

    Args:
        peak: largest absolute value of each channel.
        most: largest share of channels that copies may add.
        grid: thresholds between the largest peak and 0.

    >>> [t.tolist() for t in candidate_counts(torch.tensor([4.0, 1.0, 1.0, 1.0]), 0.5, 8)]
    [[2, 1, 1, 1], [3, 1, 1, 1]]
    """
    by_total: dict[int, Tensor] = {}
    top = float(peak.max())
    for step in range(1, grid if top else 0):  # an input that is always 0 has nothing to take apart
        theta = top * (1 - step / grid)
        copies = copies_over(peak, theta)
        extra = int((copies - 1).sum())
        if extra > most * len(peak):
            break
        if extra:
            by_total.setdefault(extra, copies)
    return list(by_total.values())


def copies_over(peak: Tensor, theta: float) -> Tensor:
    """``max(1, ceil(peak / theta))`` ``(channels,)``.

    >>> copies_over(torch.tensor([4.0, 1.0, 0.5]), 1.5).tolist()
    [3, 1, 1]
    """
    return (peak / theta).ceil().clamp(min=1).long()


def fold(block: Block, edge: Edge, idx: Tensor, divisor: Tensor, weight: Tensor, into: Tensor | None = None) -> Block:
    """The block with the channels between ``edge.src`` and its readers reindexed: repeated, reordered, removed.

    Args:
        block: one layer.
        edge: a ``channels`` edge, which folds, or a ``norm`` edge, where a gather stays online.
        idx: the old index of each new channel.
        divisor: the number of copies of each new channel, or the number of channels of which it is the mean.
        weight: the readers' stacked weights ``(out, channels)``, compensated for removed channels, in the old order.
        into: the new channel that each old channel is merged into, or -1; after norms only.
    """
    params, clips, ops = dict(block.params), dict(block.clips), dict(block.ops)
    if isinstance(edge.src, Projection):
        assert into is None, "a mean of products does not fold"
        # Of a squared activation the source's rows take the root: its square is what the copies share.
        gather_rows(params, clips, edge.src, idx, divisor.double() ** (1 / edge.power))
        if edge.partner is not None:
            gather_rows(params, clips, edge.partner, idx, torch.ones_like(divisor))
    else:
        ops[edge.src.module] = gather_behind(ops.get(edge.src.module), idx, divisor, into)
    readers = [dst.module for dst in edge.readers]
    rows = [block.weight(name).shape[0] for name in readers]
    for name, part in zip(readers, weight[:, idx].split(rows), strict=True):
        params[f"{name}.weight"] = part.to(params[f"{name}.weight"].dtype).contiguous()
        if name in clips and clips[name][0].shape[-1] > 1:
            del clips[name]  # chosen for other groups of channels
    return replace(block, params=params, clips=clips, ops=ops)


def gather_behind(op: RuntimeOp | None, idx: Tensor, divisor: Tensor, into: Tensor | None = None) -> RuntimeOp:
    """The runtime op after a norm: the gather, or an existing matrix with its columns gathered."""
    gather = Gather(idx, (1 / divisor).float(), into)
    if op is None:
        return gather
    if not isinstance(op, Matrix):
        raise LowbitError("reassemble: channels after this norm are already reassembled; remove one of the steps")
    return Matrix(gather(op.matrix))


def gather_rows(
    params: dict[str, Tensor],
    clips: dict[str, tuple[Tensor, Tensor]],
    projection: Projection,
    idx: Tensor,
    divisor: Tensor,
) -> None:
    """Reorder the rows of a projection's weight, bias and clips; divide weight and bias by ``divisor``."""

    def gathered(rows: Tensor) -> Tensor:
        scale = divisor.double().reshape(-1, *[1] * (rows.ndim - 1))
        return (rows[idx] / scale).to(rows.dtype)

    count = params[projection.parameter].shape[0]
    projection.change(params, gathered)
    name = projection.module
    if name in clips and clips[name][0].shape[0] == count:
        order = torch.arange(count, device=idx.device)
        order[projection.index] = order[projection.index][idx]
        low, high = clips[name]
        clips[name] = (low[order], high[order])
