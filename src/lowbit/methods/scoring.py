"""The objective of searches: a block's output error with quantizers enabled."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbit.methods.rtn import RTN
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run_quantized
from lowbit.models.shard import states_of


def output_error(block: Block, calib: Calib, sequences: int) -> float:
    """The output error of the block quantized by RTN, each token relative to its float output.

    Args:
        block: with candidates for its parameters, clips or ops.
        calib: the hidden states before and after it.
        sequences: number of sequences used, from the first.
    """
    first = torch.arange(min(sequences, len(calib.x_q)))
    x, y_fp = (states_of(states, first).to(block.device) for states in (calib.x_q, calib.y_fp))
    y = run_quantized(RTN()(block, replace(calib, x_q=x)), x, calib.batch)
    return float(relative_loss(y, y_fp, loss_unit(y_fp, "token")))
