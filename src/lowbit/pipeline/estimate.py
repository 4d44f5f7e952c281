"""Estimates of a run's memory, disk space and time, from shapes and a short measurement.

Memory covers embeddings and head, one window of blocks (float weights, a working copy, second moments, those of as
many experts as one pass collects) and the hidden states; for ``rounding`` and ``tune`` also what they learn, with
gradients, best values and the optimizer's moments. Time is the floating-point operations of the forward passes over
the measured matrix-product throughput; searches and factorizations are not counted, so it is a lower bound.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lowbit.distributed.tree import PARTIAL_SUMS
from lowbit.methods.inputs import HELD
from lowbit.methods.options import with_options
from lowbit.methods.rounding import Rounding
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.recipe import Recipe, Step
from lowbit.runs.plan import Plan, linear_shapes

LEAF_COPIES = 6  # of a learned parameter: value, best value, gradient, Adam's two moments and step counts


@dataclass(frozen=True)
class Estimate:
    """Peak memory, size of the result on disk, and a lower bound on the time."""

    memory_bytes: int
    disk_bytes: int
    seconds: float


def estimate(skeleton: Skeleton, plan: Plan, recipe: Recipe, samples: int, length: int) -> Estimate:
    """Estimate a run over ``samples`` windows of ``length`` tokens on this machine's CPU."""
    layers = len(skeleton.layers)
    weights = [rows * columns for rows, columns in linear_shapes(skeleton).values()]
    block = sum(weights) // layers * recipe.window
    tokens, hidden = samples * length, skeleton.text_config.hidden_size
    widest = max(columns for _, columns in linear_shapes(skeleton).values())
    shared = sum(p.numel() for n, p in skeleton.model.named_parameters() if n in skeleton.shared_names)
    # x_fp and x_q with their successors; a step that runs a window block by block has four more, one of them shared
    # with the window.
    states = (7 if recipe.window > 1 else 4) * tokens * hidden * 4
    experts = max(
        (own.count for kind in skeleton.architecture.layers if (own := kind.experts or kind.listed)), default=0
    )
    moments = max(2 * widest * widest * 8, PARTIAL_SUMS * min(experts * widest * widest * 4, HELD))
    activations = 4 * length * widest * 4 * 6
    memory = 400_000_000 + 2 * shared * 4 + 3 * block * 4 + states + moments + activations
    if recipe.tune is not None:
        memory += 4 * recipe.tune.parameter_count(linear_shapes(skeleton).values()) * LEAF_COPIES
    memory += 4 * block * _rounding_copies(recipe)
    disk = plan.size_bytes + 4 * plan.float_weights
    passes = 2 + sum(_passes(step, samples) for _, step in recipe.steps)
    return Estimate(memory, disk, 2.0 * sum(weights) * tokens * passes / matmul_speed())


def _passes(step: Step, samples: int) -> float:
    """A step's forward passes over all windows; its epochs may take a part of them."""
    if step.schedule is None:
        return step.passes
    rest = with_options(step, epochs=0).passes
    return rest + (step.passes - rest) * step.schedule.per_epoch(samples) / samples


def _rounding_copies(recipe: Recipe) -> int:
    """Values for each weight of a window that learned rounding holds."""
    return max((step.options.copies for _, step in recipe.steps if isinstance(step, Rounding)), default=0)


def matmul_speed() -> float:
    """Floating-point operations a second of a float32 matrix product on this machine; best of three short runs."""
    a = torch.rand(768, 768)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(4):
            a @ a
        best = max(best, 4 * 2 * 768**3 / (time.perf_counter() - began))
    return best
