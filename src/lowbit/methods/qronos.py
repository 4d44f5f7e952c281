"""Qronos: GPTQ towards the float model's output, with a first column that makes up for the error of the input.

Source: Zhang et al., ICLR 2026, arXiv 2505.11695. With the input ``X`` in the float model, the input ``Y`` of the
quantized one, ``q`` the values chosen so far and ``w`` the weights that are still free, column ``t`` is quantized to

    q_t = argmin_p |W X - sum_{j<t} q_j Y_j - p Y_t - sum_{j>t} w_j Y_j|^2          (error correction)

and all later columns become the least-squares solution for the rest,

    w_{>t} = argmin_v |W X - sum_{j<=t} q_j Y_j - sum_{j>t} v_j Y_j|^2              (error diffusion).

With ``H = Y Y^T`` and ``G = X Y^T`` this has a closed form (the paper's theorem). Column 1 rounds

    w_1 + (W (G - H))_1 / H_11,

since all others still have their original values. From then on what is free solves the least-squares problem, so
that correction is rounding to nearest, and diffusion is GPTQ's: behind any choice of ``q_1`` the columns after it are
those of GPTQ on the weight ``V = W + W (G - H) H^-1``, the solution for all columns, with the error ``V_1 - q_1``.

So it differs from ``gptq`` with ``target: output``, which quantizes the same ``V``, in the first column alone, and in
that one ``ridge`` holds the weights and damps the Hessian: every step minimises the error plus ``ridge`` times the
squared distance from ``W``. The paper's is 1e-6 of the largest eigenvalue, for more tokens than a short calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.methods.gptq import GRAMS, Columns, live_mean, with_codes
from lowbit.methods.in_order import quantized_in_order
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.statistics import Statistics, paired_statistics
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat


@dataclass(frozen=True)
class Qronos(Method):
    """Error-compensating quantization towards the float model's output.

    Attributes:
        ridge: added to the Hessian's diagonal, as a share of the diagonal's mean; it holds the weights near the
            original ones where few calibration tokens say little.
        act_order, block_size, tokens, search: see ``GPTQ``.
    """

    ridge: float = 0.3
    act_order: bool = True
    block_size: int = 128
    tokens: str = "normalized"
    search: bool = False
    rounds: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "both"
    closed_form: ClassVar[bool] = True
    moves_norms: ClassVar[bool] = False
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 8

    def __post_init__(self) -> None:
        check_choices("qronos", self, {"tokens": tuple(GRAMS)})
        check_bounds("qronos", self, {"ridge": "above 0", "block_size": "1 or more"})

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: only codes change."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """Codes for every linear that has a format, for both streams of hidden states."""
        return quantized_in_order(block, calib, "qronos", self._figures, self._statistics, self._quantize)

    @property
    def _figures(self) -> tuple[str, str]:
        """Names of ``H`` and ``G`` in ``statistics.py``."""
        gram = GRAMS[self.tokens]
        return gram, gram.replace("gram", "cross")

    def _statistics(self, block: Block, calib: Calib, linears: Sequence[str]) -> dict[str, Statistics]:
        return paired_statistics(block, block, calib, linears, self._figures)

    def _quantize(self, block: Block, linears: Sequence[str], tokens: int, gram: Tensor, cross: Tensor) -> Block:
        """Quantize linears that share an input, with ``H`` and ``G`` ``(in, in)``."""
        columns = Columns("qronos", self.ridge, self.act_order, self.block_size, self.search)
        at = int(columns.order(gram.diagonal())[0])
        weights, first = {}, {}
        for name in linears:
            weights[name], first[name] = corrected(block.weight(name), gram, cross, self.ridge, at)
        return with_codes(block, weights, gram, columns, first)


def corrected(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float, at: int) -> tuple[Tensor, Tensor]:
    """The least-squares weight ``V`` ``(out, in)``, and the values of the first column before rounding ``(out,)``.

    Args:
        weight: ``W`` ``(out, in)``.
        gram: ``H`` ``(in, in)``.
        cross: ``G`` ``(in, in)``.
        ridge: as a share of the mean of ``H``'s diagonal over inputs that are not always 0.
        at: the first column.

    Two inputs that are always 1 where the float model has 2: together the weights 1 and 1 have to give 4. A first
    column that makes up for it alone becomes 3; solved together, each becomes 2.

    >>> ones = torch.ones(2, 2)
    >>> weight, first = corrected(torch.ones(1, 2), ones, 2 * ones, 1e-6, 0)
    >>> [round(x, 3) for x in [*weight[0].tolist(), *first.tolist()]]
    [2.0, 2.0, 3.0]
    """
    hessian = gram.double()
    # Inputs that are always 0 in the quantized model have zeros in both moments; any positive value keeps weights.
    hessian = hessian + torch.diag(ridge * live_mean(hessian) + (hessian.diagonal() == 0).double())
    pull = weight.double() @ (cross.double() - gram.double())
    solved = weight.double() + torch.linalg.solve(hessian, pull, left=False)
    first = weight[:, at].double() + pull[:, at] / hessian[at, at]
    return solved.to(weight.dtype), first.to(weight.dtype)
