"""What a run will take, before it starts: memory, disk and time, from shapes and a short measurement.

Memory is embeddings and head, one window of blocks (float weights, a copy that a method works on, second moments)
and the streams of hidden states; for ``tune`` also all that it learns, with gradients and Adam's moments. Time counts
the floating-point operations of forward passes and divides by what a matrix product reaches here; searches and
factorisations come on top, so it is a lower estimate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.recipe import Recipe
from lowbit.runs.plan import Plan, linear_shapes

LEAF_COPIES = 6  # of what a fit learns: itself, its best, its gradient, Adam's two moments and step counts


@dataclass(frozen=True)
class Estimate:
    """What a run takes: ``memory_bytes`` at its peak, ``disk_bytes`` of the result, ``seconds`` at least."""

    memory_bytes: int
    disk_bytes: int
    seconds: float


def estimate(skeleton: Skeleton, plan: Plan, recipe: Recipe, samples: int, length: int) -> Estimate:
    """Estimate a run over ``samples`` windows of ``length`` tokens on this machine's CPU."""
    layers = len(skeleton.layers)
    weights = [rows * columns for rows, columns in linear_shapes(skeleton).values()]
    block = sum(weights) // layers * recipe.window
    tokens, hidden = samples * length, skeleton.config.hidden_size
    widest = max(columns for _, columns in linear_shapes(skeleton).values())
    rest = sum(p.numel() for n, p in skeleton.model.named_parameters() if n in skeleton.shared_names)
    # x_fp, x_q and what replaces them; steps that go through a window block by block have such four of their own, of
    # which one is the window's.
    streams = (7 if recipe.window > 1 else 4) * tokens * hidden * 4
    moments = 2 * widest * widest * 8
    activations = 4 * length * widest * 4 * 6
    memory = 400_000_000 + 2 * rest * 4 + 3 * block * 4 + streams + moments + activations
    if recipe.tune is not None:
        memory += 4 * recipe.tune.learned(linear_shapes(skeleton).values()) * LEAF_COPIES
    stored = plan.stored_bits / 8 if plan.layout == "pack-quantized" else float(sum(weights))
    disk = int(stored) + 4 * plan.float_weights
    passes = 2 + sum(method.passes for _, method in recipe.steps)
    return Estimate(memory, disk, 2.0 * sum(weights) * tokens * passes / matmul_speed())


def matmul_speed() -> float:
    """Floating-point operations a second of a float32 matrix product here, the best of three short tries."""
    a = torch.rand(768, 768)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(4):
            a @ a
        best = max(best, 4 * 2 * 768**3 / (time.perf_counter() - began))
    return best
