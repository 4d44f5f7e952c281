"""A step on a window's layers in turn, each behind those before it as they would ship."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.methods.rtn import RTN
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run_all, run_quantized

Step = Callable[[Block, Calib], Block]


def layer_by_layer(step: Step, block: Block, calib: Calib, size: int = 1) -> Block:
    """The block with ``step`` done to ``size`` of its layers at a time.

    The quantized hidden states go through what was done, rounded to nearest; the float ones through the float layers.

    Args:
        step: takes some layers with their own calibration data, and gives them back changed.
        block: a window of layers.
        calib: before and behind the window.
        size: layers that the step gets as one.
    """
    x_fp, x_q, done = calib.x_fp, calib.x_q, block
    for first in range(0, len(block.layers), size):
        part = block.part(first, first + size)
        y_fp = run_all(part, x_fp, batch=calib.batch)
        part = step(part, Calib(x_fp, x_q, y_fp, calib.batch))
        rounded = RTN()(part, calib)
        x_fp, x_q = y_fp, run_quantized(rounded, x_q, calib.batch)
        done = done.with_part(part)
    return done
