"""Signs: per-channel sign flips that narrow the range of quantized activations.

With a zero point, the codes cover the interval between a token's smallest and largest value. Two outlier channels,
one always positive and one always negative, make a range twice as wide as either; with one of them negated, in the
activation and in the weight's column, the range is half as wide and the quantization noise a quarter. A diagonal of 1
and -1 folds wherever a diagonal does. Gradient descent on the logarithms of scales (OmniQuant, AffineQuant) cannot
reach it. Not in the papers.

The objective is ``mean over tokens of (max - min)**2 / mean square``, to which the noise of uniform quantization is
proportional. Optimal signs are a hard combinatorial problem; here each channel in turn, the largest first, takes the
better sign given all others, until none changes. If the result is worse than no flips, none are applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.methods.cold import is_cold
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.statistics import input_statistics, stride_for
from lowbit.models.block import Block, Calib
from lowbit.models.edges import Edge, first_edges
from lowbit.models.equivalence import Params, can_move, move
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.models.shard import States
from lowbit.quant.activations import ActFormat

MOMENT = 7  # a channel starts with the sign of this odd moment: extremes determine ranges
SWEEPS = 8  # maximum; two or three are typical
TOKENS = 2048  # approximate sample size, evenly spread over the calibration corpus


@dataclass(frozen=True)
class Signs(Method):
    """Sign flips at norms, heads and channels before linears whose inputs are quantized with a zero point."""

    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True
    needs: ClassVar[Needs] = "x_fp"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = True
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 1

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: a diagonal of signs folds."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with sign flips folded; its float function is unchanged."""
        params, flipped = with_signs(block, calib.x_fp, calib.batch)
        clips = turned_clips(block, params)
        return replace(block, params=params, clips=clips).with_record("signs", {"turned_over": flipped})


def _applies(block: Block, edge: Edge) -> bool:
    """Whether sign flips fold at the edge and can narrow a range after it."""
    if edge.kind not in ("norm", "heads", "channels") or edge.positive or not can_move(block, edge):
        return False
    formats = [block.input_format(dst.module) for dst in edge.readers]
    return any(format is not None and format.independent_ends for format in formats)


@torch.no_grad()
def with_signs(
    block: Block, x: States, batch: int, edges: Sequence[Edge] | None = None
) -> tuple[Params, dict[str, int]]:
    """Parameters with sign flips folded at the block's edges, and the number of flipped channels at each.

    Args:
        block: the block; norms with a runtime op after them are skipped.
        x: its input in the float model ``(sequences, length, hidden)``.
        batch: sequences to run at once.
        edges: edges to consider; all by default.
    """
    chosen = first_edges(e for e in block.edges() if _applies(block, e) and (edges is None or e in edges))
    readers = {edge.readers[0].module: edge for edge in chosen}
    params: Params = dict(block.params)
    if not readers:
        return params, {}
    stride = stride_for(x.shape[:2], TOKENS)
    seen = input_statistics(block, x, readers, ("tokens",), batch=batch, every=stride)
    flipped = {}
    for name, edge in readers.items():
        stats = seen.pop(name)
        if is_cold(block, name, stats.given) or not stats.count:
            continue
        rows = stats["tokens"]
        rows = rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
        rows = edge.readers[0].inputs(rows)
        # The query heads of a group share their KV head's channels.
        low, high = edge.pooled(rows, "amin"), edge.pooled(rows, "amax")
        signs = best_signs(low, high)
        flipped[edge.src.module] = int((signs < 0).sum())
        params = move(block, edge, signs.reshape(edge.diagonal_shape), params)
    return params, flipped


def turned_clips(block: Block, params: Params) -> dict[str, tuple[Tensor, Tensor]]:
    """The block's clipping ratios for weights whose signs are those of ``params``.

    The ends of a row that is negated as a whole change places, and their ratios with them. Where columns are negated,
    the ends are others: ratios that were chosen for the old ones are left out.
    """
    out = {}
    for name, (low, high) in block.clips.items():
        before, now = block.weight(name), params[f"{name}.weight"]
        turned = (now == -before).all(1)
        if bool((turned | (now == before).all(1)).all()):
            turned = turned[:, None] & (now != before).any(1)[:, None]  # a row of zeros is both
            low, high = (ratio.expand(len(now), ratio.shape[-1]) for ratio in (low, high))
            out[name] = (low.where(~turned, high), high.where(~turned, low))
    return out


def best_signs(low: Tensor, high: Tensor) -> Tensor:
    """Signs ``(channels,)`` that reduce the sum of the tokens' squared ranges.

    Args:
        low: smallest value of a channel in a token, ``(tokens, channels)``; a channel has several values where query
            heads share a KV head.
        high: largest value; ``low`` itself where a channel has one value.

    Two channels of opposite sign, in units of the token's root mean square:

    >>> x = torch.tensor([[4.0, -4.0, 0.5], [5.0, -3.0, 0.5]])
    >>> best_signs(x, x).tolist()
    [1.0, -1.0, 1.0]

    The ranges fall from 8 and 8 to 4 and 5, and the noise to ``(16 + 25) / (64 + 64) = 0.32``.
    """
    if low.shape[1] == 1:
        return torch.ones_like(low[0])
    # On the CPU: a sequential loop over channels with a few thousand numbers each leaves a GPU idle.
    extremes = (high.T.contiguous().cpu(), low.T.contiguous().cpu())  # (channels, tokens)
    moment = (extremes[0] + extremes[1]).double().pow(MOMENT).sum(1)
    initial = torch.where(moment < 0, -1.0, 1.0)
    unflipped = torch.ones_like(initial)
    signs = _descend(*extremes, initial)
    if _squared_ranges(*extremes, signs) > _squared_ranges(*extremes, unflipped):
        signs = unflipped
    # Negating all signs gives the same ranges; take the variant with fewer flips.
    return (signs if (signs > 0).sum() * 2 >= len(signs) else -signs).to(low)


def _extents(high: Tensor, low: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's extent above and below zero with ``signs``, ``(channels, tokens)`` each."""
    flipped = signs[:, None] < 0
    return torch.where(flipped, -low, high), torch.where(flipped, high, -low)


def _squared_ranges(high: Tensor, low: Tensor, signs: Tensor) -> float:
    """The sum of the tokens' squared ranges."""
    up, down = _extents(high, low, signs)
    return float((up.amax(0).clamp(min=0) + down.amax(0).clamp(min=0)).double().square().sum())


def _descend(high: Tensor, low: Tensor, signs: Tensor) -> Tensor:
    """Coordinate descent on the sum of squared ranges, from ``signs``."""
    signs = signs.clone()
    up, down = _extents(high, low, signs)
    ranges = _Ends(up), _Ends(down)
    order = torch.maximum(up, down).amax(1).argsort(descending=True).tolist()
    outermost = ranges[0].outermost() | ranges[1].outermost()
    for _ in range(SWEEPS):
        changed = False
        for channel in order:
            # Only a channel that bounds some token's range can narrow one; most do not.
            if channel not in outermost:
                continue
            top, bottom = (ends.without(channel) for ends in ranges)
            now = ranges[0].value + ranges[1].value
            new = torch.maximum(top, down[channel]) + torch.maximum(bottom, up[channel])
            if float((now.square() - new.square()).sum()) <= 1e-7 * float(now.square().sum()):
                continue
            up[channel], down[channel] = down[channel].clone(), up[channel].clone()
            signs[channel] *= -1
            for ends in ranges:
                ends.update(channel)
            outermost = ranges[0].outermost() | ranges[1].outermost()
            changed = True
        if not changed:
            break
    return signs


class _Ends:
    """One end of each token's range, at least 0, with and without its outermost channel.

    Rows of ``values`` ``(channels, tokens)`` may change; ``update`` must then be called with the channel.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.top_values, self.top_channels = values.topk(2, dim=0)

    @property
    def value(self) -> Tensor:
        """The end of each token's range, ``(tokens,)``."""
        return self.top_values[0].clamp(min=0)

    def outermost(self) -> set[int]:
        """The channels that are outermost in at least one token."""
        return set(self.top_channels[0].unique().tolist())

    def without(self, channel: int) -> Tensor:
        """``value`` without ``channel``."""
        return torch.where(self.top_channels[0] == channel, self.top_values[1], self.top_values[0]).clamp(min=0)

    def update(self, channel: int) -> None:
        """Recompute the tokens where ``channel`` is, or becomes, one of the outermost two."""
        touched = (self.top_channels == channel).any(0) | (self.values[channel] >= self.top_values[1])
        tokens = touched.nonzero().flatten()
        if len(tokens):
            self.top_values[:, tokens], self.top_channels[:, tokens] = self.values[:, tokens].topk(2, dim=0)
