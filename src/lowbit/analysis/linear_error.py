"""What rounding one linear, alone, does to its block's output, measured while its float weight is still at hand.

A run folder holds rounded weights of a model whose maps have moved. The float weights that they were rounded from
exist while a run works on their block and nowhere after, so this is where a single linear's sensitivity can be measured
for every recipe. With ``y`` the output of the block as its steps left it, in float, and ``y_p`` the same with
linear ``p`` rounded as it ships (and its input, where scheme or runtime round activations):

    error(p) = mean over tokens of ||y_p - y||^2 / ||y||^2  +  sum over tokens of ||y_p - y||^2 / sum of ||y||^2

on the float model's own input to that block, for the first calibration window. The first term lets every token count
alike. The second counts what the few tokens with massive activations lose (Sun et al. 2024, arXiv 2402.17762): all
later tokens attend to these, so an error there layer_sensitivity all, and a mean over tokens hides it.

``input`` is the part of it that comes with the rounded input alone, which no wider weight mends. ``rtn`` has the
linear's own output error, relative in the same way, for rounding to nearest at several widths: how sensitivity shrinks or
grows with bits. It is measured on fewer than ``2 * ROWS`` output rows, since each row is rounded on its own.

Rejected: keeping the float weights (four times the folder), and the error of a linear's own output as its sensitivity (an
error of a tenth in k and one in down do not weigh the same).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.metrics.kl import token_error
from lowbit.models.block import Block
from lowbit.models.forward import relative_error, run
from lowbit.quant.format import Format
from lowbit.quant.integer import integer

BITS = (2, 3, 4, 5, 6, 8)  # widths whose sensitivity is measured
ROWS = 64


def only(block: Block, linear: str) -> Block:
    """The block with one linear's formats left: all others, Q, K and V stay float."""
    return replace(block, formats={linear: block.formats[linear]}, kv=None)


@torch.no_grad()
def layer_sensitivity(block: Block, x: Tensor) -> dict[int, dict[str, Any]]:
    """Plain data for each layer of a rounded block, by the layer's index.

    Args:
        block: the block with its float parameters and the rounded weights beside them.
        x: the block's input in the float model, ``(sequences, length, hidden)``.

    Returns:
        ``tokens``, ``error`` (all that the run rounds in the layer, at once) and, in ``linears``, by a linear's name
        within the layer: ``error``, ``input`` and ``rtn`` (by bits, as text).
    """
    out = {}
    for at, index in enumerate(block.indices):
        layer = block.part(at, at + 1)
        inputs: dict[str, Tensor] = {}
        y = run(layer, x, taps={name: partial(inputs.__setitem__, name) for name in layer.qweights})
        quantized = run(layer, x, layer.quantized_params(), quantized=True)
        linears = {
            name.removeprefix(f"{index}."): _alone(layer, name, x, y)
            | {"rtn": _by_bits(layer.weight(name), inputs[name], q.format)}
            for name, q in layer.qweights.items()
        }
        out[index] = {"tokens": y[..., 0].numel(), "error": relative_errors(quantized, y), "linears": linears}
        x = y
    return out


def relative_errors(got: Tensor, wanted: Tensor) -> float:
    """The error of outputs ``(..., width)``: relative for each token, in the mean, and for all together, as a sum.

    >>> relative_errors(torch.tensor([[1.0, 1.0], [6.0, 8.0]]), torch.tensor([[1.0, 0.0], [6.0, 8.0]]))
    0.5099009900990099
    """
    return token_error(got, wanted) / wanted[..., 0].numel() + relative_error(got, wanted)


def _alone(layer: Block, name: str, x: Tensor, y: Tensor) -> dict[str, float]:
    """The error of one linear quantized, and the part of it that its quantized input makes."""
    params: Mapping[str, Tensor] = {**layer.params, f"{name}.weight": layer.qweights[name].dequantize()}
    if layer.input_format(name) is None:
        return {"error": relative_errors(run(layer, x, params), y), "input": 0.0}
    alone = only(layer, name)
    whole, part = run(alone, x, params, quantized=True), run(alone, x, layer.params, quantized=True)
    return {"error": relative_errors(whole, y), "input": relative_errors(part, y)}


def _by_bits(weight: Tensor, x: Tensor, format: Format) -> dict[str, float]:
    """Relative error of ``x @ weight.T``, the weight rounded to nearest, for ``BITS`` and the format's own width."""
    rows = weight[:: max(1, len(weight) // ROWS)].float()
    x = x.float()
    wanted = x @ rows.T
    own = integer(format, "a table of errors by bits")
    out = {}
    for bits in sorted({*BITS, own.bits}):
        quantized = own.with_bits(bits).fake_quant_clipped(rows)
        out[str(bits)] = relative_errors(x @ quantized.T, wanted)
    return out
