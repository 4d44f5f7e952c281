"""Clipping ratios from a scale search, where the block's output says that they help: the start of a learned step.

A rule that derives a scale from a group's largest value is far from the best one in floating-point formats, tables
and superblocks. Gradient descent does not get there: a power of two does not follow a small step, and the best scale
of NVFP4 is often larger than the rule's, where no clipping leads. A search by the weights' own errors gets there, and
overshoots: clipping makes every weight that it touches smaller, so that errors of columns add up which the search
takes for independent. So ratios are taken for the linears of one input at a time, where they lower the error of the
block's output. They become ratios of ranges, so that scales follow the maps that are trained afterwards.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.methods.inputs import input_groups
from lowbit.methods.statistics import column_importance
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run
from lowbit.models.offload import select_sequences
from lowbit.quant.integer import IntFormat
from lowbit.quant.scale_search import search_ratios

SEQUENCES = 4  # that decide: each choice takes one pass over them


@torch.no_grad()
def with_searched_clips(block: Block, calib: Calib, sequences: Tensor) -> Block:
    """The block with clipping ratios of searched scales, for linears that have none and where they help.

    Args:
        block: the block at the starting point of a fit, with qparams for its static inputs.
        calib: the hidden states before it.
        sequences: indices of those that the fit trains on; the first of them decide.

    Integers are left as they are: their rule is near the best scale, and learned clipping finds the rest.
    """
    groups = [tuple(name for name in group if _is_searched(block, name)) for group in input_groups(block)]
    groups = [group for group in groups if group]
    if not groups:
        return block
    importance = column_importance(block, calib, [name for group in groups for name in group])
    chosen = sequences[:SEQUENCES]
    x, y = (select_sequences(states, chosen).to(block.device) for states in (calib.x_q, calib.y_fp))
    lowest = _error(block, x, y)
    for group in groups:
        found = {
            name: search_ratios(
                block.weight(name), block.weight_format(name), importance[name], block.tensor_peak(name)
            )
            for name in group
        }
        tried = replace(block, clips={**block.clips, **found})
        if (error := _error(tried, x, y)) < lowest:
            block, lowest = tried, error
    return block


def _is_searched(block: Block, linear: str) -> bool:
    return (
        linear in block.formats
        and linear not in block.clips
        and not isinstance(block.weight_format(linear), IntFormat)
    )


def _error(block: Block, x: Tensor, y: Tensor) -> float:
    """The error of the block rounded to nearest: each token's, relative to its float output."""
    params = block.fake_quant_clipped(block.params, block.clips)
    return float(relative_loss(run(block, x, params, quantized=True), y, loss_unit(y, "token")))
