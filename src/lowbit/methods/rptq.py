"""RPTQ: channels reordered into clusters by their ranges, each of which has one static range.

Source: Yuan et al., 2023, arXiv 2304.01089. Where ranges are fixed in advance and channels differ by orders of
magnitude, one range for all of them rounds most to zero. k-means over each channel's ``(min, max)`` on the
calibration data gives clusters (section 4.2); channels of a cluster become neighbours, with a range of their own.
The reorder keeps the float function (section 4.3):

================= ===================================================================================================
up -> down        rows of up and gate, columns of down: nothing stays
v -> o            within each KV head, rows of v and columns of o: nothing stays; each head has clusters of its own
norm -> linears   columns of the linears; the norm writes its output in the new order (``Reorder``)
================= ===================================================================================================

Inputs elsewhere keep their order, and their ranges are of equal parts of it; a note names them.

Differences from the paper: ranges follow from the values of a cluster by the run's estimator (``--input-range``),
``min-max`` being the paper's; queries and keys are not reordered, since their quantization inside the attention has
one dynamic range for a token and head.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lowbit.methods.channel_clusters import cluster_ranges, reordered
from lowbit.methods.input_ranges import with_input_ranges, without_input_ranges
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_choices
from lowbit.methods.reassemble import gather_rows
from lowbit.methods.statistics import input_statistics
from lowbit.models.block import Block, Calib
from lowbit.models.edges import Edge, Projection, first_edges
from lowbit.models.equivalence import check_can_move
from lowbit.models.prefix import VALUES, change_cached
from lowbit.models.reorder import Reorder
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.static_clusters import StaticClusters

SITES = {"all": ("norm", "channels", "heads"), "folded": ("channels", "heads")}  # ``sites`` -> kinds of edge


@dataclass(frozen=True)
class RPTQ(Method):
    """Channels in the order of their ranges, for inputs with a static range for each cluster (``-static32``).

    Attributes:
        sites: ``all``, or ``folded``: not behind norms, where the order stays online.
    """

    sites: str = "all"
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True
    needs: ClassVar[Needs] = "x_q"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = True
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_choices("rptq", self, {"sites": tuple(SITES)})

    def folded(self) -> Self:
        """Orders where they fold."""
        return replace(self, sites="folded")

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """Reorders behind norms, where inputs have ranges of clusters."""
        online = self.sites == "all" and isinstance(inputs, StaticClusters)
        return frozenset({Reorder}) if online else NO_OPS

    @torch.no_grad()
    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with reordered channels and calibrated ranges; its float function is unchanged."""
        clustered = [name for name in block.quantized_linears() if _format(block, name) is not None]
        if not clustered:
            text = (
                "no input has ranges of clusters, so no channel is reordered: choose a scheme such as w4a8-static32"
            )
            return block.with_notes("rptq", text)
        edges = [edge for edge in block.edges() if edge.kind in SITES[self.sites] and _reorders(block, edge)]
        edges = first_edges(edges)
        firsts = [edge.readers[0].module for edge in edges]
        seen = input_statistics(block, calib.x_q, firsts, ("low", "high"), batch=calib.batch) if firsts else {}
        done, sizes = _Reordered(without_input_ranges(block)), dict[str, list[int]]()
        figures: dict[str, dict[str, Any]] = {}
        for edge, first in zip(edges, firsts, strict=True):
            idx, parts = _order(block, edge, seen[first]["low"], seen[first]["high"])
            done.reorder(edge, idx)
            sizes |= {dst.module: parts for dst in edge.readers}
            figures[first] = {"clusters": len(parts), "largest": max(parts), "online": edge.kind == "norm"}
        result = with_input_ranges(done.block(), calib, sizes)
        if given := [name for name in clustered if name not in sizes]:
            result = result.with_notes("rptq", f"ranges of equal parts, in the given order: {', '.join(given)}")
        return result.with_record("rptq", figures) if figures else result


def _format(block: Block, linear: str) -> StaticClusters | None:
    """The format of a linear's input, if it has ranges of clusters."""
    inputs = block.input_format(linear)
    return inputs if isinstance(inputs, StaticClusters) else None


def _reorders(block: Block, edge: Edge) -> bool:
    """Whether channels can be reordered at the edge, and a reader's ranges gain by it."""
    format = _format(block, edge.readers[0].module)
    if format is None or any(dst.columns is not None for dst in edge.readers):
        return False
    if edge.kind == "heads":
        # A permutation is a matrix; with fewer than two clusters a head, none has an effect.
        return edge.limit in ("matrix", "rotation") and format.clusters >= 2 * edge.layout.query
    return edge.gathers and edge.heads is None


def _order(block: Block, edge: Edge, low: Tensor, high: Tensor) -> tuple[Tensor, list[int]]:
    """The order of the source's channels ``(channels,)``, and the sizes of the readers' clusters.

    Args:
        block: the block.
        edge: an edge that reorders.
        low, high: ends of the readers' channels ``(in,)``.
    """
    format = _format(block, edge.readers[0].module)
    assert format is not None
    if edge.kind != "heads":
        idx, sizes = reordered(cluster_ranges(low, high, format.clusters))
        return idx.to(low.device), sizes
    heads = edge.layout
    lows = edge.pooled(low, "amin").unflatten(0, (heads.kv, heads.dim))
    highs = edge.pooled(high, "amax").unflatten(0, (heads.kv, heads.dim))
    order: list[Tensor] = []
    sizes = []
    for head in range(heads.kv):
        idx, parts = reordered(cluster_ranges(lows[head], highs[head], format.clusters // heads.query))
        order.append(idx + head * heads.dim)
        sizes += parts * heads.group
    return torch.cat(order).to(low.device), sizes


@dataclass
class _Reordered:
    """A block whose channels are reordered, edge by edge.

    Attributes:
        given: the block.
        params, clips, ops: what becomes of its own.
    """

    given: Block
    params: dict[str, Tensor] = field(init=False)
    clips: dict[str, tuple[Tensor, Tensor]] = field(init=False)
    ops: dict[str, RuntimeOp] = field(init=False)

    def __post_init__(self) -> None:
        block = self.given
        self.params, self.clips, self.ops = dict(block.params), dict(block.clips), dict(block.ops)

    def reorder(self, edge: Edge, idx: Tensor) -> None:
        """Put the source's channels into the order ``idx`` ``(channels,)``, and the readers' columns with them."""
        if isinstance(edge.src, Projection):
            ones = torch.ones(len(idx), device=idx.device)
            for source in (edge.src, edge.partner):
                if source is not None:
                    gather_rows(self.params, self.clips, source, idx, ones)
            if edge.kind == "heads":
                change_cached(self.params, VALUES, edge, lambda rows: rows[idx])
        else:
            check_can_move(self.given, edge)
            self.ops[edge.src.module] = Reorder(idx)
        columns = _columns(edge, idx)
        for dst in edge.readers:
            dst.change_weight(self.params, lambda weight: weight[:, columns].contiguous())
            if dst.module in self.clips and self.clips[dst.module][0].shape[-1] > 1:
                del self.clips[dst.module]  # chosen for groups of other channels

    def block(self) -> Block:
        """The block with all of it."""
        return replace(self.given, params=self.params, clips=self.clips, ops=self.ops)


def _columns(edge: Edge, idx: Tensor) -> Tensor:
    """The order of a reader's columns for one of the source's channels; query heads follow their KV head.

    Two query heads on one KV head of two channels that change places: columns 1, 0, 3, 2.
    """
    if edge.kind != "heads":
        return idx
    heads = edge.layout
    within = idx.unflatten(0, (heads.kv, heads.dim)) - heads.dim * torch.arange(heads.kv, device=idx.device)[:, None]
    spread = within.repeat_interleave(heads.group, 0)
    return (spread + heads.dim * torch.arange(heads.query, device=idx.device)[:, None]).flatten()
