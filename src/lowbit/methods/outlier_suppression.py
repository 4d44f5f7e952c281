"""Outlier Suppression+: centres channels and scales down those that exceed a searched threshold.

Source: Wei et al., EMNLP 2023, arXiv 2304.09145. For every norm, with the minimum and maximum of each channel over
the float model's activations,

    z = (max + min) / 2                    shift (section 4.1), where the norm and all its readers have a bias
    s = max(1, max|x - z| / t)             scale (section 4.2): channels within the threshold are unchanged

The threshold ``t`` of each norm is searched on a grid below the largest ``max|x - z|``, by the layer's output error
with quantizers enabled; the unchanged layer is a candidate. Where no bias takes the shift (Llama's norms have none),
``z`` is 0, and a note says so.

Difference from the paper: each token's error is relative to its float output, so that a few tokens with massive
activations do not dominate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.methods.layer_by_layer import layer_by_layer
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds
from lowbit.methods.scoring import output_error
from lowbit.methods.statistics import input_statistics
from lowbit.models.block import Block, Calib
from lowbit.models.edges import Edge, first_edges
from lowbit.models.equivalence import can_shift, move
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat


@dataclass(frozen=True)
class OutlierSuppression(Method):
    """Per-channel shift and scale at every norm.

    Attributes:
        grid: thresholds per norm, equally spaced from the largest value downwards.
        sequences: calibration sequences that score a candidate.
        shift: centre channels where the norm and all its readers have a bias that takes the shift.
    """

    grid: int = 20
    sequences: int = 4
    shift: bool = True
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True
    needs: ClassVar[Needs] = "both"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = True
    schedule: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_bounds("outlier-suppression+", self, {"grid": "1 or more", "sequences": "1 or more"})

    @property
    def passes(self) -> int:
        """Statistics at two norms and the hidden states after a layer; candidates run on few sequences."""
        return 4

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: diagonals and shifts fold."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with shifts and scales folded at its norms; its float function is unchanged."""
        return layer_by_layer(self._layer, block, calib) if block.formats else block

    def _layer(self, layer: Block, calib: Calib) -> Block:
        figures: dict[str, dict[str, float | int]] = {}
        unshifted: list[str] = []
        for edge in first_edges(edge for edge in layer.edges() if edge.kind == "norm" and edge.scales):
            if any(dst.module in layer.formats for dst in edge.readers):
                layer, figures[edge.src.module] = self._edge(layer, edge, calib)
                if self.shift and not can_shift(layer, edge):
                    unshifted.append(edge.src.module)
        if unshifted:
            text = f"no bias takes a shift at {', '.join(unshifted)}: channels are scaled around 0"
            layer = layer.with_notes("outlier-suppression+", text)
        return layer.with_record("outlier-suppression+", figures)

    def _edge(self, block: Block, edge: Edge, calib: Calib) -> tuple[Block, dict[str, float | int]]:
        reader = edge.readers[0].module
        seen = input_statistics(block, calib.x_fp, [reader], ("low", "high"), batch=calib.batch)[reader]
        own = edge.readers[0]
        low, high = edge.pooled(own.inputs(seen["low"]), "amin"), edge.pooled(own.inputs(seen["high"]), "amax")
        shift = (low + high) / 2 if self.shift and can_shift(block, edge) else None
        peak = torch.maximum(low.abs(), high.abs()) if shift is None else (high - low) / 2
        best, best_error = block, output_error(block, calib, self.sequences)
        figures: dict[str, float | int] = {"error_before": best_error, "scaled_channels": 0}
        for step in range(self.grid):
            threshold = float(peak.max()) * (1 - step / self.grid)
            scale = suppression_scale(peak, threshold)
            candidate = replace(block, params=move(block, edge, scale, shift=shift))
            error = output_error(candidate, calib, self.sequences)
            if error < best_error:
                best, best_error = candidate, error
                figures |= {"threshold": threshold, "scaled_channels": int((scale > 1).sum())}
                if shift is not None:
                    figures["largest_shift"] = float(shift.abs().max())
        return best, figures | {"error": best_error}


def suppression_scale(peak: Tensor, threshold: float) -> Tensor:
    """``max(1, peak / threshold)`` ``(channels,)``: the divisor of activations and factor of weights.

    >>> suppression_scale(torch.tensor([8.0, 2.0, 1.0]), 2.0).tolist()
    [4.0, 1.0, 1.0]
    """
    return (peak / max(threshold, 1e-5)).clamp(min=1)
