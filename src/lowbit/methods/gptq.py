"""GPTQ: quantizes a weight column by column; the remaining columns compensate for each column's error.

Source: Frantar et al., ICLR 2023, arXiv 2210.17323 (Cholesky form, section 3.3). Linears are quantized in
execution order, each against its input in the model that is quantized up to it, with activations quantized as the
scheme says.

Choices:

* Qparams are computed before the first column is quantized. Activation order (columns with the strongest inputs
  first) then needs no index at run time: groups stay contiguous and the checkpoint format is unchanged. Qparams
  computed during the pass would follow the updated weights, but tie groups to the order.
* The factorisation runs in float64, which takes a few per cent of the time and fails less often. If it fails, the
  damping is multiplied by ten, and a note records it.
* A column whose input is always 0 does not affect the error: it is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.finite import is_finite
from lowbit.methods.damping import damping_of
from lowbit.methods.gptq_columns import gptq_codes
from lowbit.methods.in_order import quantized_in_order
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.refit import output_target
from lowbit.methods.sparsity import Pattern
from lowbit.methods.statistics import Statistics, input_statistics, paired_statistics
from lowbit.methods.triangular import inverse_of_upper
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format, QParams, QTensor
from lowbit.quant.scale_search import search_scales

GRAMS = {"unweighted": "gram", "normalized": "normalized_gram"}  # ``tokens`` -> figure of ``statistics.py``
CHOICES = {"tokens": tuple(GRAMS), "target": ("weights", "output")}


@dataclass(frozen=True)
class GPTQ(Method):
    """Error-compensating quantization.

    Attributes:
        damping: added to the Hessian's diagonal, as a share of the diagonal's mean.
        shrinkage: this times the inputs of a linear over its calibration tokens is added to ``damping``, see
            ``damping.py``.
        act_order: quantize the columns with the strongest inputs first.
        block_size: columns per update of the remaining weight.
        tokens: ``unweighted``: the paper's Hessian; ``normalized``: the Hessian of per-token normalized inputs (each
            token divided by its root mean square), so that a few tokens with massive activations do not dominate.
        target: the output that the quantized linear approximates. ``weights``: the original weight's output on the
            quantized model's input (the paper). ``output``: the float model's output, which also compensates for the
            error of the input (asymmetric calibration, arXiv 2504.02692).
        search: choose each group's scale among those next to its range's, by the squared error of its weights rounded
            to nearest, each column weighted with the diagonal of the Hessian. It needs more calibration tokens than
            columns: with fewer, GPTQ compensates for nearly any error except that of clipped weights.
        ridge: with ``output``, the ridge strength towards the original weight, as a share of the diagonal's mean.
        head: the head, where it has a format, is quantized likewise, against the last hidden states; else it is
            rounded to nearest.
    """

    damping: float = 0.01
    shrinkage: float = 1.0
    act_order: bool = True
    block_size: int = 128
    tokens: str = "normalized"
    target: str = "weights"
    search: bool = False
    ridge: float = 0.1
    head: bool = False
    rounds: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "both"
    closed_form: ClassVar[bool] = True
    moves_norms: ClassVar[bool] = False
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_choices("gptq", self, CHOICES)
        check_bounds(
            "gptq",
            self,
            {"damping": "above 0", "shrinkage": "0 or more", "block_size": "1 or more", "ridge": "above 0"},
        )

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: only codes change."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """Codes for every linear that has a format, computed on the quantized hidden states."""
        return quantized_in_order(block, calib, "gptq", self._figures, self._statistics, self._round)

    @property
    def _figures(self) -> tuple[str, ...]:
        """Names of the input's second moments and, if needed, its cross moments with the float model's input."""
        gram = GRAMS[self.tokens]
        return (gram,) if self.target == "weights" else (gram, gram.replace("gram", "cross"))

    def _statistics(self, block: Block, calib: Calib, linears: Sequence[str]) -> dict[str, Statistics]:
        """``_figures`` of the linears' inputs, ``(in, in)`` each."""
        if self.target == "output":
            return paired_statistics(block, block, calib, linears, self._figures)
        return quantized_input_statistics(block, calib, linears, self._figures)

    def _round(
        self, block: Block, linears: Sequence[str], tokens: int, gram: Tensor, cross: Tensor | None = None
    ) -> Block:
        """Quantize linears that share an input, with its ``_figures`` over ``tokens`` tokens."""
        weights = {name: block.weight(name) for name in linears}
        if cross is not None:
            weights = {name: output_target(weight, gram, cross, self.ridge) for name, weight in weights.items()}
        return with_codes(block, weights, gram, self.columns(len(gram), tokens))

    def columns(self, inputs: int, tokens: int) -> Columns:
        """How a linear's columns are gone over: it has ``inputs`` inputs, and moments of ``tokens`` tokens."""
        damping = damping_of(self.damping, self.shrinkage, inputs, tokens)
        return Columns("gptq", damping, self.act_order, self.block_size, self.search)


def quantized_input_statistics(
    block: Block, calib: Calib, linears: Sequence[str], figures: tuple[str, ...]
) -> dict[str, Statistics]:
    """Figures of linears' inputs in the block with its codes so far."""
    params = block.quantized_params()
    return input_statistics(block, calib.x_q, linears, figures, params, quantized=True, batch=calib.batch)


@dataclass(frozen=True)
class Columns:
    """How ``with_codes`` goes over the columns of a weight.

    Attributes:
        step: the method's name, for notes and errors.
        damping, act_order, block_size, search: see ``GPTQ``.
    """

    step: str
    damping: float
    act_order: bool
    block_size: int
    search: bool

    def order(self, strength: Tensor) -> Tensor:
        """The order in which columns are quantized ``(in,)``; ``strength`` is the Hessian's diagonal."""
        if self.act_order:
            return torch.argsort(strength, descending=True, stable=True)
        return torch.arange(len(strength), device=strength.device)


def with_codes(
    block: Block,
    weights: Mapping[str, Tensor],
    gram: Tensor,
    columns: Columns,
    first: Mapping[str, Tensor] | None = None,
    pattern: Pattern | None = None,
) -> Block:
    """The block with codes of linears that share an input.

    Args:
        block: the block.
        weights: what is quantized, by linear: ``(out, in)`` each.
        gram: second moments of the input ``(in, in)``.
        columns: how.
        first: by linear, the values ``(out,)`` that are quantized in place of those of the first column.
        pattern: which weights become 0.
    """
    linears, strength = list(weights), gram.diagonal()
    order = columns.order(strength)
    upper, damping = inverse_factor(gram[order][:, order], columns.damping, columns.step)
    if damping != columns.damping:
        raised = f"damping raised from {columns.damping:g} to {damping:g} for {', '.join(linears)}"
        block = block.with_notes(columns.step, raised, layer=int(linears[0].partition(".")[0]))
    qweights = dict(block.qweights)
    # Linears with the same input and format are quantized as one stacked matrix: a third of the steps. A pattern's
    # share of zeros is one of each linear's.
    stacks = _by_format(block, linears) if pattern is None else [(block.weight_format(n), [n]) for n in linears]
    for format, names in stacks:
        qparams = [_qparams(block, name, weights, _importance(block, name, strength, columns)) for name in names]
        stacked = QParams(*(torch.cat(parts) for parts in zip(*qparams, strict=True)))
        weight = torch.cat([weights[name] for name in names])
        start = None if first is None else torch.cat([first[name] for name in names])
        codes = gptq_codes(weight, upper, order, stacked, format, columns.block_size, start, pattern)
        parts = codes.split([weights[name].shape[0] for name in names])
        for name, own, part in zip(names, qparams, parts, strict=True):
            qweights[name] = QTensor(part.contiguous(), own, format)
    return replace(block, qweights=qweights)


def _importance(block: Block, name: str, strength: Tensor, columns: Columns) -> Tensor | None:
    """What a search of scales weights columns with; ``None``: scales are not searched."""
    return block.importance.get(name, strength) if columns.search else None


def _qparams(block: Block, name: str, weights: Mapping[str, Tensor], strength: Tensor | None) -> QParams:
    """The qparams of a linear, of which ``weights`` has the weight; with ``strength`` scales are searched."""
    format, weight, peak = block.weight_format(name), weights[name], block.tensor_peak(name, weights)
    low, high = block.clips.get(name, (1.0, 1.0))
    qparams = format.qparams(weight, low, high, peak)
    return qparams if strength is None else search_scales(weight, format, qparams, strength, peak)


def _by_format(block: Block, linears: Sequence[str]) -> list[tuple[Format, list[str]]]:
    out: dict[Format, list[str]] = {}
    for name in linears:
        out.setdefault(block.weight_format(name), []).append(name)
    return list(out.items())


def inverse_factor(gram: Tensor, damping: float, step: str = "gptq") -> tuple[Tensor, float]:
    """The upper Cholesky factor of the damped ``gram``'s inverse ``(in, in)``, and the damping used.

    ``damping`` is a share of the diagonal's mean; it is multiplied by ten until the factorisation succeeds. The
    Cholesky factor of ``H`` with rows and columns reversed gives ``H = R R^T`` with an upper ``R``; then
    ``H^-1 = R^-T R^-1`` and the factor is ``R^-1``: one factorisation and one triangular inverse, without the inverse
    of ``H``.
    """
    hessian = gram.double()
    mean, hessian = live_mean(hessian), hessian.flip(0, 1)
    diagonal = hessian.diagonal()
    diagonal += (diagonal == 0).double()  # uncorrelated with all others; any positive value
    while damping < 1e6 and is_finite(hessian):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper = inverse_of_upper(lower.flip(0, 1))
            if is_finite(upper):
                return upper.to(gram.dtype), damping
        damping *= 10
    raise LowbitError(f"{step}: the second moments of a linear's input contain NaN or infinity; check the model")


def live_mean(gram: Tensor) -> Tensor:
    """The mean of the diagonal over inputs that are not always 0, of which damping is a share.

    >>> float(live_mean(torch.diag(torch.tensor([2.0, 0.0, 4.0]))))
    3.0
    """
    diagonal = gram.diagonal()
    return diagonal.sum() / (diagonal != 0).sum().clamp(min=1)
