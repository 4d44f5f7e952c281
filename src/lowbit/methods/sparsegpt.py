"""SparseGPT: GPTQ in which half of the codes, or another share, are those of 0.

Source: Frantar and Alistarh, ICML 2023, arXiv 2301.00774 (algorithm 1; joint quantization, section 3.5). Columns are
gone through as in GPTQ. When the first of some columns is reached, the weights among them that cost least become 0
(``sparsity.py``); each column's error, of rounding or of removal, is compensated by the columns after it:

    q_c = Q(w_c) where it stays, else 0,     w_{>c} = w_{>c} - (w_c - q_c) / U_cc U_{c,>c}.

``2:4`` and ``4:8`` are decided four and eight columns at a time, ``unstructured`` every ``block_size`` columns.
Columns keep their natural order, since a pattern is one of neighbours. The stored checkpoint is dense: a removed
weight has the code of 0. compressed-tensors dropped its sparse layouts, and stock ``transformers`` loads none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.methods.cold import moments_or_identity
from lowbit.methods.damping import damping_of
from lowbit.methods.gptq import GRAMS, Columns, quantized_input_statistics, with_codes
from lowbit.methods.in_order import quantized_in_order
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.sparsity import OfEach, Pattern, Share
from lowbit.methods.statistics import Statistics
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format

OF_EACH = {"2:4": OfEach(2, 4), "4:8": OfEach(4, 8)}


@dataclass(frozen=True)
class SparseGPT(Method):
    """Pruning and quantization in one pass over the columns.

    Attributes:
        pattern: ``2:4``, ``4:8`` or ``unstructured``.
        sparsity: share of zeros with ``unstructured``; the others have one half.
        damping, shrinkage, block_size, tokens, search: see ``GPTQ``.
    """

    pattern: str = "2:4"
    sparsity: float = 0.5
    damping: float = 0.01
    shrinkage: float = 1.0
    block_size: int = 128
    tokens: str = "normalized"
    search: bool = False
    rounds: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "x_q"
    closed_form: ClassVar[bool] = True
    moves_norms: ClassVar[bool] = False
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_choices("sparsegpt", self, {"tokens": tuple(GRAMS), "pattern": (*OF_EACH, "unstructured")})
        bounds = {
            "damping": "above 0",
            "shrinkage": "0 or more",
            "block_size": "1 or more",
            "sparsity": "from 0 to below 1",
        }
        check_bounds("sparsegpt", self, bounds)
        if self.block_size % (unit := self._pattern.columns):
            raise LowbitError(
                f"sparsegpt.block_size {self.block_size} given; with pattern {self.pattern} it must be a multiple of "
                f"{unit}"
            )

    @property
    def _pattern(self) -> Pattern:
        return OF_EACH.get(self.pattern) or Share(self.sparsity, self.block_size)

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: only codes change."""
        return NO_OPS

    def refusal(self, format: Format, columns: int) -> str | None:
        """A format without a code for 0, such as the table of IQ4_NL, or a width that the pattern does not divide.

        Offsets of K-quants meet 0 by chance alone, so the values asked about are random ones.
        """
        values = torch.randn(1, columns, generator=torch.Generator().manual_seed(0))
        qparams = format.per_column(format.qparams(values), columns)
        if bool((format.nearest(torch.zeros_like(qparams.scale), qparams) != 0).any()):
            return "has no code for 0, which removed weights need"
        if isinstance(self._pattern, OfEach) and columns % self._pattern.of:
            return f"has rows of {columns} here, no multiple of {self._pattern.of}; pattern unstructured has any"
        return None

    def __call__(self, block: Block, calib: Calib) -> Block:
        """Codes for every linear that has a format, of which the pattern's share stands for 0.

        Raises:
            LowbitError: a format has no code for 0, or a width is no multiple of the pattern's.
        """
        for name in block.quantized_linears():
            self._check(block, name)
        figures = (GRAMS[self.tokens],)
        done = quantized_in_order(block, calib, "sparsegpt", figures, self._statistics, self._quantize, self._cold)
        zeros = {name: _zeros(done, name) for name in done.quantized_linears()}
        return done.with_record("sparsegpt", {"pattern": self.pattern, "stored": "dense", "zeros": zeros})

    def _check(self, block: Block, name: str) -> None:
        format, columns, pattern = block.weight_format(name), block.weight(name).shape[1], self._pattern
        qparams = format.per_column(block.qparams(name), columns)
        if bool((format.nearest(torch.zeros_like(qparams.scale), qparams) != 0).any()):
            raise LowbitError(
                f"sparsegpt: {format.name}, the format of {block.full_name(name)}, has no code for 0, which removed "
                "weights need; choose a scheme with integer or floating-point weights"
            )
        if isinstance(pattern, OfEach) and columns % pattern.of:
            raise LowbitError(
                f"sparsegpt: {block.full_name(name)} has {columns} inputs, no multiple of {pattern.of}; choose "
                "pattern unstructured, or leave the linear in float by an override"
            )

    def _statistics(self, block: Block, calib: Calib, linears: Sequence[str]) -> dict[str, Statistics]:
        return quantized_input_statistics(block, calib, linears, (GRAMS[self.tokens],))

    def _quantize(self, block: Block, linears: Sequence[str], tokens: int, gram: Tensor) -> Block:
        damping = damping_of(self.damping, self.shrinkage, len(gram), tokens)
        columns = Columns("sparsegpt", damping, False, self.block_size, self.search)
        return with_codes(block, {name: block.weight(name) for name in linears}, gram, columns, pattern=self._pattern)

    def _cold(self, block: Block, linears: Sequence[str]) -> Block:
        """Without data the smallest weights go, and nothing makes up for them."""
        return self._quantize(block, linears, 1, moments_or_identity(block, linears[0], None))


def _zeros(block: Block, name: str) -> float:
    """The share of a linear's stored values that are 0; some round to it."""
    return float((block.qweights[name].dequantize() == 0).double().mean())
