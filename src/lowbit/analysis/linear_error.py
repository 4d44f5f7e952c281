"""Sensitivity of single linears: the error at the block's output when only one of its linears is quantized.

A run folder holds quantized weights of a transformed model. The float weights behind them exist only while a run
works on their block, so this is where a single linear's sensitivity can be measured for every recipe. With ``y`` the
output of the block in float after its steps, and ``y_p`` the same with linear ``p`` quantized as it ships (and its
input, where scheme or runtime quantize activations):

    error(p) = mean over tokens of ||y_p - y||^2 / ||y||^2  +  sum over tokens of ||y_p - y||^2 / sum of ||y||^2

on the float model's input to that block, for the first calibration window. The first term weights all tokens equally.
The second captures errors at the few tokens with massive activations (Sun et al. 2024, arXiv 2402.17762): all later
tokens attend to these, so an error there affects every token, and a mean over tokens hides it.

``input`` is the part of the error due to the quantized input alone, which no wider weight reduces. ``own`` is the
relative error of the linear's own output with its weight rounded to nearest in its format, and ``rtn`` that with
integers of several widths: their ratio predicts how the sensitivity changes with bits. They are measured on fewer
than ``2 * ROWS`` output rows, since rows are quantized independently.

Rejected: keeping the float weights (four times the folder size), and the error of a linear's own output as its
sensitivity (equal errors in k and in down do not have equal effects).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.distributed.share import each
from lowbit.metrics.kl import token_error
from lowbit.models.block import Block
from lowbit.models.experts_function import ExpertsReplay
from lowbit.models.forward import relative_error, run
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat

BITS = (2, 3, 4, 5, 6, 8)  # widths in ``rtn``
ROWS = 64
WHOLE = ""  # in place of a linear's name
LEAST = 16  # values of a group of integers that a format with smaller groups at the edge is compared with


def only(block: Block, linear: str) -> Block:
    """The block with the formats of one linear: all other linears, Q, K and V stay float."""
    return replace(block, formats={linear: block.formats[linear]}, kv=None)


@torch.no_grad()
def layer_sensitivity(block: Block, x: Tensor) -> dict[int, dict[str, Any]]:
    """Sensitivities of each layer of a quantized block, plain data by the layer's index.

    The processes of a job, all of which call it, share the linears.

    Args:
        block: the block with float parameters and quantized weights.
        x: the block's input in the float model, ``(sequences, length, hidden)``.

    Returns:
        ``tokens``, ``error`` (the whole layer quantized) and, in ``linears``, by a linear's name
        within the layer: ``error``, ``input``, ``own`` and ``rtn`` (by bits, as text).
    """
    out = {}
    for position, index in enumerate(block.indices):
        layer = block.part(position, position + 1)
        inputs: dict[str, Tensor] = {}
        replay = ExpertsReplay()
        y = run(layer, x, taps={name: partial(inputs.__setitem__, name) for name in layer.qweights}, replay=replay)
        of_linear = partial(_figures, layer=layer, inputs=inputs, x=x, y=y, replay=replay)
        *figures, whole = each([*layer.qweights, WHOLE], of_linear)
        linears = {name.removeprefix(f"{index}."): own for name, own in zip(layer.qweights, figures, strict=True)}
        out[index] = {"tokens": y[..., 0].numel(), **whole, "linears": linears}
        x = y
    return out


def _figures(
    name: str, layer: Block, inputs: Mapping[str, Tensor], x: Tensor, y: Tensor, replay: ExpertsReplay
) -> dict[str, Any]:
    """Figures of one linear of a layer, or the error of the whole layer."""
    if name == WHOLE:
        return {"error": relative_errors(run(layer, x, layer.quantized_params(), quantized=True), y)}
    weight, format = layer.weight(name), layer.qweights[name].format
    if name not in inputs or not inputs[name].numel():
        return _unreached(weight, format)
    return _alone(layer, name, x, y, replay) | _rounded(weight, inputs[name], format)


def relative_errors(got: Tensor, exact: Tensor) -> float:
    """Error of outputs ``(..., width)``: the mean of the tokens' relative errors plus the relative error of all.

    >>> relative_errors(torch.tensor([[1.0, 1.0], [6.0, 8.0]]), torch.tensor([[1.0, 0.0], [6.0, 8.0]]))
    0.5099009900990099
    """
    return token_error(got, exact) / exact[..., 0].numel() + relative_error(got, exact)


def _alone(layer: Block, name: str, x: Tensor, y: Tensor, replay: ExpertsReplay) -> dict[str, float]:
    """Errors with only this linear quantized, and with only its input quantized.

    For an expert's linear that expert runs alone: the others' outputs are those of the float pass, ``replay``.
    """
    params: Mapping[str, Tensor] = {**layer.params, f"{name}.weight": layer.dequantized(name)}
    expert = layer.expert_of(name) if layer.is_stacked(name) else None
    again = None if expert is None else replay.alone(expert)
    if layer.input_format(name) is None:
        return {"error": relative_errors(run(layer, x, params, replay=again), y), "input": 0.0}
    alone = only(layer, name)
    whole, part = (run(alone, x, own, quantized=True, replay=again) for own in (params, layer.params))
    return {"error": relative_errors(whole, y), "input": relative_errors(part, y)}


def _unreached(weight: Tensor, format: Format) -> dict[str, Any]:
    """Figures of an expert's linear that no token of ``x`` reaches: errors of its weights, and none of the output."""
    return {"error": 0.0, "input": 0.0} | _rounded(weight, torch.eye(weight.shape[1], device=weight.device), format)


def _rounded(weight: Tensor, x: Tensor, format: Format) -> dict[str, Any]:
    """Relative error of ``x @ weight.T`` with RTN weights: ``own``, and ``rtn`` with integers of ``BITS``.

    A format of another kind is compared with symmetric integers in groups of its size; where its own last group is
    smaller, of the largest part of that size which divides the width, or, if that is below ``LEAST``, in rows.
    """
    rows = weight[:: max(1, len(weight) // ROWS)].float()
    x = x.float()
    exact = x @ rows.T

    def error(tried: Format) -> float:
        return relative_errors(x @ tried.fake_quant_clipped(rows).T, exact)

    like = format if isinstance(format, IntFormat) else IntFormat(BITS[-1], _group(format, weight.shape[1]))
    by_bits = {bits: error(like.with_bits(bits)) for bits in BITS}
    own = by_bits[format.bits] if isinstance(format, IntFormat) and format.bits in by_bits else error(format)
    return {"own": own, "rtn": {str(bits): found for bits, found in by_bits.items()}}


def _group(format: Format, columns: int) -> int | None:
    """Size of the groups of integers that a format of another kind is compared with; ``None``: rows."""
    size = math.gcd(format.group or columns, columns)
    return None if size == columns or size < LEAST else size
