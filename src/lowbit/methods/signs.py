"""Signs: channels turned over, so that the outliers of a token lie on one side of zero.

An activation format with a zero point spends its codes between a token's least and its largest value. Two outlier
channels of which one is always positive and the other always negative make a range twice as wide as either; with one
of them negated, and its column of the weight too, the range is half as wide and the rounding's noise a quarter. A
diagonal of 1 and -1 is an affine map that merges wherever a diagonal does, and one that gradient descent on
logarithms of scales, as OmniQuant and AffineQuant have them, never finds. Not in the papers.

What is minimised is ``mean over tokens of (max - min)**2 / mean square``, to which the noise of uniform rounding is
proportional. Which signs are best is a hard combinatorial question; here each channel in turn takes the sign that is
better given all others, the largest first, until none changes; where that ends above no signs at all, none are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.statistics import input_statistics
from lowbit.models.architecture import Edge
from lowbit.models.block import Block, Calib
from lowbit.models.equivalence import Params, can_move, move
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat

MOMENT = 7  # the channels' starting sign is that of a high odd moment: their extremes decide ranges
SWEEPS = 8  # at most; two or three are usual
TOKENS = 2048  # that are looked at, about, evenly spread over the calibration text


@dataclass(frozen=True)
class Signs(Method):
    """Signs over norms, heads and channels before linears whose inputs are quantized with a zero point."""

    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True
    needs: ClassVar[Needs] = "x_fp"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = True
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 1

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: a diagonal of signs merges."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with channels turned over; its float function is unchanged."""
        params, flipped = with_signs(block, calib.x_fp, calib.batch)
        return replace(block, params=params).with_record("signs", {"turned_over": flipped})


def _can(block: Block, edge: Edge) -> bool:
    """Whether signs merge over the edge and can help behind it."""
    if edge.kind not in ("norm", "heads", "channels") or edge.positive or not can_move(block, edge):
        return False
    formats = [block.input_format(dst.module) for dst in edge.readers]
    return any(format is not None and format.independent_ends for format in formats)


@torch.no_grad()
def with_signs(
    block: Block, x: Tensor, batch: int, edges: Sequence[Edge] | None = None
) -> tuple[Params, dict[str, int]]:
    """Parameters with signs moved over the block's edges, and how many channels were turned over at each.

    Args:
        block: the block; norms with a runtime op behind them are left out.
        x: its input in the float model ``(sequences, length, hidden)``.
        batch: sequences to run at once.
        edges: where signs may move; wherever they help by default.
    """
    chosen = [edge for edge in block.edges() if _can(block, edge) and (edges is None or edge in edges)]
    readers = {edge.readers[0].module: edge for edge in chosen}
    params: Params = dict(block.params)
    if not readers:
        return params, {}
    every = -(-x.shape[:-1].numel() // TOKENS)
    seen = input_statistics(block, x, readers, ("tokens",), batch=batch, every=every)
    flipped = {}
    for name, edge in readers.items():
        rows = seen.pop(name)["tokens"]
        rows = rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
        low = high = rows
        if edge.kind == "heads":  # the query heads of a group share their KV head's channels
            parts = rows.unflatten(1, (block.heads.kv, block.heads.group, block.heads.dim))
            low, high = parts.amin(2).flatten(1), parts.amax(2).flatten(1)
        signs = best_signs(low, high)
        flipped[edge.src.module] = int((signs < 0).sum())
        map = signs.unflatten(0, (block.heads.kv, block.heads.dim)) if edge.kind == "heads" else signs
        params = move(block, edge, map, params)
    return params, flipped


def best_signs(low: Tensor, high: Tensor) -> Tensor:
    """Signs ``(channels,)`` that make the tokens' squared ranges small together.

    Args:
        low: least value of a channel in a token, ``(tokens, channels)``; several values share a channel where query
            heads share a KV head.
        high: the largest; ``low`` itself where a channel has one value.

    Two channels that always point in opposite ways, in units of the token's root mean square:

    >>> x = torch.tensor([[4.0, -4.0, 0.5], [5.0, -3.0, 0.5]])
    >>> best_signs(x, x).tolist()
    [1.0, -1.0, 1.0]

    The ranges were 8 and 8 and are 4 and 5: the noise falls to ``(16 + 25) / (64 + 64) = 0.32`` of what it was.
    """
    if low.shape[1] == 1:
        return torch.ones_like(low[0])
    # Channel after channel, a few thousand numbers each: a GPU would be waiting for the host most of the time.
    given = (high.T.contiguous().cpu(), low.T.contiguous().cpu())  # (channels, tokens)
    moment = (given[0] + given[1]).double().pow(MOMENT).sum(1)
    start = torch.where(moment < 0, -1.0, 1.0)
    none = torch.ones_like(start)
    signs = _descend(*given, start)
    if _squares(*given, signs) > _squares(*given, none):
        signs = none
    # All signs turned over are as good; of the two the one that leaves more channels as they are.
    return (signs if (signs > 0).sum() * 2 >= len(signs) else -signs).to(low)


def _reach(high: Tensor, low: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """How far each channel reaches above and below zero with ``signs``, ``(channels, tokens)`` each."""
    over = signs[:, None] < 0
    return torch.where(over, -low, high), torch.where(over, high, -low)


def _squares(high: Tensor, low: Tensor, signs: Tensor) -> float:
    """The sum of the tokens' squared ranges."""
    up, down = _reach(high, low, signs)
    return float((up.amax(0).clamp(min=0) + down.amax(0).clamp(min=0)).double().square().sum())


def _descend(high: Tensor, low: Tensor, signs: Tensor) -> Tensor:
    """Coordinate descent from ``signs``."""
    signs = signs.clone()
    up, down = _reach(high, low, signs)
    ranges = _Ends(up), _Ends(down)
    order = torch.maximum(up, down).amax(1).argsort(descending=True).tolist()
    outermost = ranges[0].outermost() | ranges[1].outermost()
    for _ in range(SWEEPS):
        changed = False
        for channel in order:
            # One that ends no token's range makes none smaller, whatever its sign; most channels are such.
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
    """For each token how far one end of its range reaches, at least to 0, and how far without the outermost channel.

    ``values`` ``(channels, tokens)`` may change row by row; ``update`` says which.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.two, self.at = values.topk(2, dim=0)

    @property
    def value(self) -> Tensor:
        """``(tokens,)``."""
        return self.two[0].clamp(min=0)

    def outermost(self) -> set[int]:
        """The channels that reach furthest in some token."""
        return set(self.at[0].unique().tolist())

    def without(self, channel: int) -> Tensor:
        """``value`` as if ``channel`` were not there."""
        return torch.where(self.at[0] == channel, self.two[1], self.two[0]).clamp(min=0)

    def update(self, channel: int) -> None:
        """Look again at tokens where ``channel`` is one of the outermost two, or was."""
        touched = ((self.at == channel).any(0) | (self.values[channel] >= self.two[1])).nonzero().flatten()
        if len(touched):
            two, at = self.values[:, touched].topk(2, dim=0)
            self.two[:, touched], self.at[:, touched] = two, at
