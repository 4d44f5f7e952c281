"""What rounding one linear, alone, does to its block's output, measured while its float weight is still at hand.

A run folder holds rounded weights of a model whose maps have moved. The float weights that they were rounded from
exist while a run works on their block and nowhere after, so this is where a single linear's damage can be measured
for every recipe. With ``y`` the output of the block as its steps left it, in float, and ``y_p`` the same with
linear ``p`` rounded as it ships (and its input, where scheme or runtime round activations):

    error(p) = mean over tokens of ||y_p - y||^2 / ||y||^2  +  sum over tokens of ||y_p - y||^2 / sum of ||y||^2

on the float model's own input to that block, for the first calibration window. The first term lets every token count
alike. The second counts what the few tokens with massive activations lose (Sun et al. 2024, arXiv 2402.17762): all
later tokens attend to these, so an error there damages all, and a mean over tokens hides it.

``input`` is the part of it that comes with the rounded input alone, which no wider weight mends. ``rtn`` has the
linear's own output error, relative in the same way, for rounding to nearest at several widths: how damage shrinks or
grows with bits. It is measured on fewer than ``2 * ROWS`` output rows, since each row is rounded on its own.

Rejected: keeping the float weights (four times the folder), and the error of a linear's own output as its damage (an
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
from lowbit.models.block import Block, part_of, relative_error, run
from lowbit.quant.affine import QuantSpec, fake_quant, minmax_grid
from lowbit.quant.scheme import Scheme

BITS = (2, 3, 4, 5, 6, 8)  # widths whose damage is measured
ROWS = 64


def only(scheme: Scheme, linear: str, spec: QuantSpec) -> Scheme:
    """The scheme with one linear left in it, by its full name: all others, Q, K and V stay float.

    >>> from lowbit.quant.scheme import parse_scheme
    >>> one = only(parse_scheme("w4a8kv8"), "model.layers.0.mlp.up_proj", QuantSpec(4))
    >>> one.act_spec("model.layers.0.mlp.up_proj").bits, one.act_spec("model.layers.0.mlp.gate_proj"), one.kv
    (8, None, None)
    """
    return replace(scheme, kv=None, overrides=((linear, spec), ("*", None)))


@torch.no_grad()
def damages(block: Block, x: Tensor, scheme: Scheme) -> dict[int, dict[str, Any]]:
    """Plain data for each layer of a rounded block, by the layer's index.

    Args:
        block: the block with its float parameters and the rounded weights beside them.
        x: the block's input in the float model, ``(sequences, length, hidden)``.
        scheme: the run's.

    Returns:
        ``tokens``, ``error`` (all that the run rounds in the layer, at once) and, in ``linears``, by a linear's name
        within the layer: ``error``, ``input`` and ``rtn`` (by bits, as text).
    """
    out = {}
    for at, index in enumerate(block.indices):
        layer = part_of(block, at, at + 1)
        inputs: dict[str, Tensor] = {}
        y = run(layer, x, taps={name: partial(inputs.__setitem__, name) for name in layer.qweights})
        rounded = run(layer, x, layer.quantized_params(), scheme)
        linears = {
            name.removeprefix(f"{index}."): _alone(layer, name, x, y, scheme)
            | {"rtn": _by_bits(layer.weight(name), inputs[name], q.spec)}
            for name, q in layer.qweights.items()
        }
        out[index] = {"tokens": y[..., 0].numel(), "error": relative_errors(rounded, y), "linears": linears}
        x = y
    return out


def relative_errors(got: Tensor, wanted: Tensor) -> float:
    """The error of outputs ``(..., width)``: relative for each token, in the mean, and for all together, as a sum.

    >>> relative_errors(torch.tensor([[1.0, 1.0], [6.0, 8.0]]), torch.tensor([[1.0, 0.0], [6.0, 8.0]]))
    0.5099009900990099
    """
    return token_error(got, wanted) / wanted[..., 0].numel() + relative_error(got, wanted)


def _alone(layer: Block, name: str, x: Tensor, y: Tensor, scheme: Scheme) -> dict[str, float]:
    """The error of one linear rounded, and the part of it that its rounded input makes."""
    q = layer.qweights[name]
    params: Mapping[str, Tensor] = {**layer.params, f"{name}.weight": q.dequantize()}
    alone = only(scheme, layer.full_name(name), q.spec)
    if alone.inputs(layer.full_name(name)) is None:
        return {"error": relative_errors(run(layer, x, params), y), "input": 0.0}
    whole, part = run(layer, x, params, alone), run(layer, x, layer.params, alone)
    return {"error": relative_errors(whole, y), "input": relative_errors(part, y)}


def _by_bits(weight: Tensor, x: Tensor, spec: QuantSpec) -> dict[str, float]:
    """Relative error of ``x @ weight.T`` with the weight rounded to nearest, for ``BITS`` and the spec's own."""
    rows = weight[:: max(1, len(weight) // ROWS)].float()
    x = x.float()
    wanted = x @ rows.T
    out = {}
    for bits in sorted({*BITS, spec.bits}):
        one = replace(spec, bits=bits)
        out[str(bits)] = relative_errors(x @ fake_quant(rows, minmax_grid(rows, one), one).T, wanted)
    return out
