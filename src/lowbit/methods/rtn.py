"""Round to nearest (RTN): each weight to the closest value on its group's min-max range."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat


@dataclass(frozen=True)
class RTN(Method):
    """The baseline, and the last step after methods that fold maps or set clipping ratios."""

    rounds: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "none"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = False
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 0

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """Codes for every linear that has a format; needs no data."""
        qweights = dict(block.qweights)
        for linear in block.quantized_linears():
            weight = block.weight(linear)
            qweights[linear] = block.weight_format(linear).quantize(weight, block.qparams(linear))
        return replace(block, qweights=qweights)
