"""Disk space of a run: what it takes, and whether it is there."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.recipe import Recipe
from lowbit.runs.plan import Plan, linear_shapes


def size_on_disk(plan: Plan, recipe: Recipe, skeleton: Skeleton) -> int:
    """Upper bound in bytes: codes as stored, the float part at 32 bits, and temporary files of the run."""
    result = plan.size_bytes + 4 * plan.float_weights
    if recipe.tune is None:
        return result
    state = 4 * 8 * recipe.tune.parameter_count(linear_shapes(skeleton).values())  # as ``FitState.save`` writes it
    return 2 * (result + plan.quantized_weights) + state


def check_space(out: Path, needed: int) -> None:
    """Refuse a run that does not fit on the disk; shards of an interrupted run count as written."""
    folder = next(p for p in [out, *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    missing = needed - sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if free < missing:
        raise LowbitError(
            f"out of disk: the result takes about {missing:,} more bytes, {folder} has {free:,} free; free some "
            "space or choose another --out"
        )
