"""Clipping ratios that a learned step searches, epoch by epoch, where gradient descent does not find them.

A rule that derives a scale from a group's largest value is far from the best one in floating-point formats, tables
and superblocks. Gradient descent does not get there: a power of two does not follow a small step, and the best scale
of NVFP4 is often larger than the rule's, where no clipping leads. A search gets there, but what it finds is the best
for these very weights: in a block of SmolLM2 at NVFP4, entries of 0.02 at random in the maps from v to o raise the
error by a sixth. So scales are searched for the starting point and again behind each epoch, before its validation;
the epoch that is kept keeps its own.

A search by the weights' own errors also overshoots: clipping makes every weight that it touches smaller, so that
errors of columns add up which the search takes for independent. Its result is therefore taken for the linears of one
input at a time, where it lowers the error of the block's output. It is held as ratios of ranges: scales follow the
weights within an epoch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowbit.methods.inputs import input_groups
from lowbit.methods.statistics import column_importance
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run
from lowbit.models.offload import select_sequences
from lowbit.models.shard import states_of
from lowbit.quant.integer import IntFormat
from lowbit.quant.scale_search import search_ratios

SEQUENCES = 4  # that decide: each choice takes one pass over them
WEIGHTING = 16  # that weight the columns in a search: all of 64 take a sixth of a fit of AffineQuant's
Clips = Mapping[str, tuple[Tensor, Tensor]]


def split_by_format(block: Block) -> tuple[list[str], list[str]]:
    """Quantized linears whose clipping ratios are learned, the integers, and those whose ratios are searched.

    The rule for integers is near the best scale, and gradients find the rest.
    """
    split: tuple[list[str], list[str]] = [], []
    for name in block.quantized_linears():
        split[0 if isinstance(block.weight_format(name), IntFormat) else 1].append(name)
    return split


@dataclass
class SearchedClips:
    """Ratios by linear, of the starting point and of the end of each epoch.

    Attributes:
        linears: whose ratios are searched.
        calib: the hidden states before the block.
        sequences: indices of those that the fit trains on.
        epochs: the ratios of each epoch, those of the starting point first.
        now: the ratios in use.
    """

    linears: Collection[str]
    calib: Calib
    sequences: Tensor
    epochs: list[Clips] = field(default_factory=list)
    now: Clips = field(default_factory=dict)

    def keep(self, clips: Clips) -> None:
        """Use the given ratios, those that ``clips`` has of ``linears``, as the next epoch's."""
        self.now = {name: clips[name] for name in self.linears if name in clips}
        self.epochs.append(self.now)

    def search(self, block: Block) -> None:
        """Search the ratios of a block as it is at the end of an epoch."""
        if self.linears:
            self.keep(with_searched_clips(block, self.calib, self.sequences, self.linears).clips)

    def begin(self, epoch: int) -> None:
        """Use the ratios that were searched last, or, after the fit, those of the epoch that is kept."""
        if self.epochs:
            self.now = self.epochs[min(epoch, len(self.epochs) - 1)]


@torch.no_grad()
def with_searched_clips(block: Block, calib: Calib, sequences: Tensor, linears: Collection[str]) -> Block:
    """The block with clipping ratios of searched scales for those of ``linears`` where they help.

    Args:
        block: the block, with qparams for its static inputs. Where the search does not help, its ratios stay.
        calib: the hidden states before it.
        sequences: indices of those that the fit trains on; the first of them decide.
        linears: names of linears.
    """
    groups = [tuple(name for name in group if name in linears) for group in input_groups(block)]
    groups = [group for group in groups if group]
    if not groups:
        return block
    weighting = _weighting(block, calib, sequences, linears)
    importance, _ = column_importance(block, weighting, linears)  # none for experts that too few tokens reach
    chosen = sequences[:SEQUENCES]
    x, y = (states_of(states, chosen).to(block.device) for states in (calib.x_q, calib.y_fp))
    lowest = _error(block, x, y)
    for group in groups:
        found = {
            name: search_ratios(
                block.weight(name), block.weight_format(name), importance.get(name), block.tensor_peak(name)
            )
            for name in group
        }
        tried = replace(block, clips={**block.clips, **found})
        if (error := _error(tried, x, y)) < lowest:
            block, lowest = tried, error
    return block


def _weighting(block: Block, calib: Calib, sequences: Tensor, linears: Iterable[str]) -> Calib:
    """The hidden states that weight the columns; all of training for experts, as each sees a share of the tokens."""
    experts = any(block.expert_of(name) is not None for name in linears)
    return replace(calib, x_q=select_sequences(calib.x_q, sequences if experts else sequences[:WEIGHTING]))


def _error(block: Block, x: Tensor, y: Tensor) -> float:
    """The error of the block rounded to nearest: each token's, relative to its float output."""
    params = block.fake_quant_clipped(block.params, block.clips)
    return float(relative_loss(run(block, x, params, quantized=True), y, loss_unit(y, "token")))
