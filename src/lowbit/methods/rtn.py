"""Round to nearest (RTN): each weight to the closest value on its group's min-max range, or on a searched one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lowbit.methods.cold import is_cold, with_cold_note
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.inputs import input_groups
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.statistics import input_statistics
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.scale_search import search_scales


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

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """Codes for every linear that has a format."""
        block = with_input_ranges(block, calib)
        importance, cold = column_importance(block, calib) if self.search else ({}, {})
        qweights = dict(block.qweights)
        for linear in block.quantized_linears():
            weight, format, qparams = block.weight(linear), block.weight_format(linear), block.qparams(linear)
            if self.search:
                qparams = search_scales(weight, format, qparams, importance.get(linear), block.tensor_peak(linear))
            qweights[linear] = format.quantize(weight, qparams)
        what = "scales searched without calibration data"
        return with_cold_note(replace(block, qweights=qweights), "rtn", cold, what)


def column_importance(block: Block, calib: Calib) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Mean squares of the columns of each linear's quantized input ``(in,)``, by linear.

    They are over tokens that are divided by their root mean square, so that a few massive ones do not dominate.

    Returns:
        The mean squares, and the tokens of linears that have none since too few reach their expert.
    """
    groups = input_groups(block)
    if not groups:
        return {}, {}
    readers = [group[0] for group in groups]
    seen = input_statistics(block, calib.x_q, readers, ("normalized_square",), quantized=True, batch=calib.batch)
    cold = {name: seen[name].count for name in readers if is_cold(block, name, seen[name].count)}
    warm = [(group, seen[group[0]]) for group in groups if group[0] not in cold]
    return {name: stats["normalized_square"] / stats.count for group, stats in warm for name in group}, cold
