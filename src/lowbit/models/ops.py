"""All kinds of runtime ops by name. ``lowbit.load`` runs every one; exporters list those that they hold."""

from __future__ import annotations

from lowbit.models.outlier_columns import OutlierColumns
from lowbit.models.reorder import Reorder
from lowbit.models.runtime_ops import Clip, Gather, Matrix, RuntimeOp

OPS: dict[str, type[RuntimeOp]] = {op.kind: op for op in (Matrix, Gather, Reorder, Clip, OutlierColumns)}
