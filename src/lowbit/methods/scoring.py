"""What a search minimizes: the error of a block's output with the quantizers on."""

from __future__ import annotations

from lowbit.methods.rtn import RTN
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run_quantized


def output_error(block: Block, calib: Calib, sequences: int) -> float:
    """The error of the block as it would ship, rounded to nearest, each token relative to its float output.

    Args:
        block: with candidates for its parameters, clips or ops.
        calib: the hidden states before and behind it.
        sequences: how many of them are looked at, the first ones.
    """
    x, wanted = (stream[:sequences].to(block.device) for stream in (calib.x_q, calib.y_fp))
    y = run_quantized(RTN()(block, calib), x, calib.batch)
    return float(relative_loss(y, wanted, loss_unit(wanted, "token")))
