"""Clipping ratios of queries, keys and values, searched for each layer of a scheme with rotated heads.

Behind a rotation the values of a head are close to normally distributed, and the largest of a token lies far out: a
range that is a little smaller makes all other values finer (QuaRot, arXiv 2404.00456, section 4, cuts keys and values
to 0.95). How much is worth it differs between layers, so each one's ratios are those of ``GRID`` with the least error
of the layer's output, when nothing but queries, keys and values is quantized.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run
from lowbit.models.kv_ratios import KINDS, RATIOS
from lowbit.models.shard import states_of
from lowbit.quant.rotated_kv import RotatedTokens

GRID = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
SEQUENCES = 4  # that decide: each layer takes 16 passes over them
ORDER = ("key", "value", "query")


@torch.no_grad()
def with_kv_clips(block: Block, calib: Calib) -> Block:
    """A block whose layers clip the ranges of Q, K and V where that lowers the error of the block's output.

    Unchanged unless the scheme rotates heads. The ratios are parameters of each layer, see ``kv_ratios.py``.

    Args:
        block: before any step, with its values rotated.
        calib: its float input and output decide.
    """
    layers = [i for i, kind in zip(block.indices, block.kinds, strict=True) if kind.attention is not None]
    if not isinstance(block.kv, RotatedTokens) or not layers:
        return block
    chosen = torch.arange(min(SEQUENCES, len(calib.x_fp)))
    x, y = (states_of(states, chosen).to(block.device) for states in (calib.x_fp, calib.y_fp))
    ones = {f"{index}.{RATIOS}": torch.ones(len(KINDS), device=block.device) for index in layers}
    best = replace(block, params={**block.params, **ones})
    lowest = _error(best, x, y)
    for index in layers:
        for kind in ORDER:
            for ratio in GRID[1:]:
                tried = _with_ratio(best, index, kind, ratio)
                if (error := _error(tried, x, y)) >= lowest:
                    break  # the error has one minimum, but for noise
                best, lowest = tried, error
    figures = {f"{i}": best.params[f"{i}.{RATIOS}"].tolist() for i in layers}
    return best.with_record("kv_clips", figures)


def _with_ratio(block: Block, index: int, kind: str, ratio: float) -> Block:
    name = f"{index}.{RATIOS}"
    ratios = block.params[name].clone()
    ratios[KINDS.index(kind)] = ratio
    return replace(block, params={**block.params, name: ratios})


def _error(block: Block, x: Tensor, y: Tensor) -> float:
    """Of the block with nothing but Q, K and V quantized: each token's, relative to its float output."""
    return float(relative_loss(run(replace(block, formats={}), x, quantized=True), y, loss_unit(y, "token")))
