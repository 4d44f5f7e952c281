"""All kinds of runtime ops by name. ``lowbit.load`` runs every one; exporters list those that they hold."""

from __future__ import annotations

from lowbit.models.diagonal_blocks import DiagonalBlocks
from lowbit.models.fixed_hadamard import FixedHadamard
from lowbit.models.hadamard import Hadamard
from lowbit.models.kronecker import Kronecker
from lowbit.models.outlier_columns import OutlierColumns
from lowbit.models.reorder import Reorder
from lowbit.models.runtime_ops import Clip, Gather, Matrix, RuntimeOp

_ALL: tuple[type[RuntimeOp], ...] = (
    Matrix,
    Gather,
    Reorder,
    Hadamard,
    FixedHadamard,
    Kronecker,
    DiagonalBlocks,
    Clip,
    OutlierColumns,
)
OPS: dict[str, type[RuntimeOp]] = {op.kind: op for op in _ALL}
