"""Applies a step to the layers of a window in order, each after its quantized predecessors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lowbit.methods.rtn import RTN
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run_all, run_quantized

Step = Callable[[Block, Calib], Block]


def layer_by_layer(step: Step, block: Block, calib: Calib, size: int = 1) -> Block:
    """The block with ``step`` applied to ``size`` of its layers at a time.

    The quantized hidden states pass through the transformed layers, rounded to nearest; the float ones through the
    layers as they are given. The window's last layer is held against the float model's own output: a step before,
    such as one that puts similar channels together, may have changed what the layer computes.

    Args:
        step: maps consecutive layers and their own calibration data to the transformed layers.
        block: a window of layers.
        calib: hidden states before and after the window.
        size: layers per call of ``step``.
    """
    x_fp, x_q, result = calib.x_fp, calib.x_q, block
    for first in range(0, len(block.layers), size):
        part = block.part(first, first + size)
        last = first + size >= len(block.layers)
        y_fp = calib.y_fp if last else run_all(part, x_fp, batch=calib.batch)
        part = step(part, replace(calib, x_fp=x_fp, x_q=x_q, y_fp=y_fp))
        quantized = RTN()(part, replace(calib, x_q=x_q))
        x_fp, x_q = y_fp, run_quantized(quantized, x_q, calib.batch)
        result = result.with_part(part)
    return result
