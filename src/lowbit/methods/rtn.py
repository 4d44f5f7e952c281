"""Round to nearest: each weight to the closest point of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lowbit.models.block import Block, Calib, grid_of
from lowbit.quant.affine import quantize
from lowbit.quant.scheme import Scheme


@dataclass(frozen=True)
class RTN:
    """The baseline, and the last step after methods that move maps or shrink ranges."""

    rounds: ClassVar[bool] = True
    passes: ClassVar[int] = 0

    def __call__(self, block: Block, calib: Calib, scheme: Scheme) -> Block:
        """Codes for every linear that the scheme quantizes; needs no data."""
        qweights = dict(block.qweights)
        for linear in block.linears():
            spec = block.weight_spec(linear, scheme)
            if spec is not None:
                qweights[linear] = quantize(block.weight(linear), grid_of(block, linear, spec), spec)
        return replace(block, qweights=qweights)
