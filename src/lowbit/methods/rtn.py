"""Round to nearest (RTN): each weight to the closest value on its group's min-max range, or on a searched one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lowbit.methods.cold import with_cold_note
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.statistics import column_importance
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.scale_search import search_scales
from lowbit.quant.static_activations import StaticActs


@dataclass(frozen=True)
class RTN(Method):
    """The baseline, and the last step after methods that fold maps or set clipping ratios.

    Attributes:
        search: choose each group's scale among those next to its range's, by the squared error of its weights. A
            column counts with the mean square of its input over the tokens, each divided by its root mean square.
            Without it data is read only to calibrate static inputs.
    """

    search: bool = False
    rounds: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "x_q"
    closed_form: ClassVar[bool] = True
    moves_norms: ClassVar[bool] = False
    schedule: ClassVar[None] = None

    @property
    def passes(self) -> int:
        """One where the inputs are measured."""
        return int(self.search)

    def reads_quantized(self, inputs: ActFormat | None) -> bool:
        """Where scales are searched or the ranges of static inputs are missing."""
        return self.search or isinstance(inputs, StaticActs)

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """Codes for every linear that has a format."""
        block = with_input_ranges(block, calib)
        linears = block.quantized_linears() if self.search else []
        importance, cold = column_importance(block, calib, linears)
        qweights = dict(block.qweights)
        for linear in block.quantized_linears():
            weight, format, qparams = block.weight(linear), block.weight_format(linear), block.qparams(linear)
            if self.search:
                weights = block.importance.get(linear, importance.get(linear))
                qparams = search_scales(weight, format, qparams, weights, block.tensor_peak(linear))
            qweights[linear] = format.quantize(weight, qparams)
        what = "scales searched without calibration data"
        return with_cold_note(replace(block, qweights=qweights), "rtn", cold, what)
