"""SmoothQuant: migrates activation outliers into the weights by one scale per channel.

Source: Xiao et al., ICML 2023, arXiv 2211.10438, equation 4: ``s_j = max|x_j|**alpha / max|w_j|**(1 - alpha)``,
folded at the norms of a block. Maxima are over the float model's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds
from lowbit.methods.statistics import input_statistics
from lowbit.models.block import Block, Calib
from lowbit.models.edges import first_edges
from lowbit.models.equivalence import move
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat


def smooth_scale(activation_peak: Tensor, weight_peak: Tensor, alpha: float) -> Tensor:
    """The scale ``(channels,)`` that divides activations and multiplies weights; never 0.

    >>> smooth_scale(torch.tensor([16.0]), torch.tensor([1.0]), 0.5).tolist()
    [4.0]
    """
    scale = activation_peak.clamp(min=1e-5).pow(alpha) / weight_peak.clamp(min=1e-5).pow(1 - alpha)
    return scale.clamp(min=1e-5)


@dataclass(frozen=True)
class SmoothQuant(Method):
    """A diagonal at every norm.

    Attributes:
        alpha: migration strength: 0 leaves the outliers in the activations, 1 moves them into the weights entirely.
    """

    alpha: float = 0.5
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True
    needs: ClassVar[Needs] = "x_fp"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = True
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_bounds("smoothquant", self, {"alpha": "from 0 to 1"})

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: a diagonal folds into the norm."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with scales folded at its norms; its float function is unchanged."""
        norms = first_edges(edge for edge in block.edges() if edge.kind == "norm" and edge.scales)
        if not norms:
            return block
        readers = [edge.readers[0].module for edge in norms]
        seen = input_statistics(block, calib.x_fp, readers, ("peak",), batch=calib.batch)
        params = dict(block.params)
        for edge, reader in zip(norms, readers, strict=True):
            weight_peak = torch.stack([dst.read(params).abs().amax(0) for dst in edge.readers]).amax(0)
            peak = edge.pooled(edge.readers[0].inputs(seen[reader]["peak"]), "amax")
            scale = smooth_scale(peak, edge.pooled(weight_peak, "amax"), self.alpha)
            params = move(block, edge, scale, params)
        return replace(block, params=params)
