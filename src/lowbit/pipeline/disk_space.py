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
    """Refuse a run that does not fit on the disk; what an interrupted run has written counts.

    That is its shards, and what ``tune`` keeps in ``.run``: the result of the earlier steps, their latent weights and
    the state of the fit, all of which ``size_on_disk`` holds. Example: of 10 GB needed, 3 GB of shards and 6 GB in
    ``.run`` leave 1 GB.

    Raises:
        LowbitError: the disk has less free than is missing.
    """
    folder = next(p for p in [out, *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    missing = needed - sum(map(_size, out.rglob("*.safetensors")))
    if free < missing:
        raise LowbitError(
            f"out of disk: the result takes about {missing:,} more bytes, {folder} has {free:,} free; free some "
            "space or choose another --out"
        )


def _size(path: Path) -> int:
    """A file's bytes; 0 for one that another process of the run has removed since it was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
