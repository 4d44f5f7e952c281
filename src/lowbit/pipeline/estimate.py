"""Estimates of a run's memory, disk space and time, from shapes and a machine's rates; docs/scale.md has the model.

What is not counted: reading the model and writing the result, searches and factorisations of steps outside
``step_operations.COUNTED``, and what a device and its host do at the same time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.layer_shapes import LayerShape, layer_shapes
from lowbit.pipeline.machine import Machine, measured_rates
from lowbit.pipeline.memory_needs import Needs, needs_of
from lowbit.pipeline.operations import NOTHING, Tokens, Work, walk
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.step_operations import is_counted, step_work
from lowbit.runs.plan import Plan

WALK = "passes between steps, sensitivity"


@dataclass(frozen=True)
class Model:
    """What time and memory depend on.

    Attributes:
        shapes: how many layers have each shape.
        shared: parameters of embeddings, norms and head.
        vocabulary: rows of the head.
        disk_bytes: size of the result.
    """

    shapes: Counter[LayerShape]
    shared: int
    vocabulary: int
    disk_bytes: int

    @classmethod
    def of(cls, skeleton: Skeleton, plan: Plan) -> Model:
        """That of a model with a plan, by shapes alone."""
        shared = sum(p.numel() for n, p in skeleton.model.named_parameters() if n in skeleton.shared_names)
        vocabulary = skeleton.model.get_input_embeddings().weight.shape[0]
        return cls(layer_shapes(skeleton, plan), shared, vocabulary, plan.size_bytes + 4 * plan.float_weights)


@dataclass(frozen=True)
class Calibration:
    """Windows of calibration text.

    Attributes:
        samples: their number.
        length: tokens of each.
    """

    samples: int
    length: int

    def on(self, machine: Machine) -> Tokens:
        """The same with what the machine's ranks and its dtype make of it."""
        return Tokens(self.samples, self.length, machine.value_bytes, ranks=machine.ranks)


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        needs: memory of a rank.
        disk_bytes: size of the result.
        work: of the busiest rank, by step.
        seconds: by step; ``None`` where the machine's rates are not known.
        uncounted: steps of which the passes alone are counted, so that the time is a lower bound.
    """

    needs: Needs
    disk_bytes: int
    work: Mapping[str, Work]
    seconds: Mapping[str, float] | None
    uncounted: tuple[str, ...]

    @property
    def total_seconds(self) -> float | None:
        """All of it."""
        return None if self.seconds is None else sum(self.seconds.values())


def estimate(model: Model, recipe: Recipe, calibration: Calibration, machine: Machine) -> Estimate:
    """What a recipe takes of a machine."""
    data = calibration.on(machine)
    work = work_of(model, recipe, data)
    rates = machine.rates
    seconds = None if rates is None else {name: own.seconds(rates, machine.ranks) for name, own in work.items()}
    uncounted = tuple(dict.fromkeys(name for name, step in recipe.steps if not is_counted(step)))
    needs = needs_of(model.shapes, recipe, data, machine, model.shared, model.vocabulary)
    return Estimate(needs, model.disk_bytes, work, seconds, uncounted)


def work_of(model: Model, recipe: Recipe, data: Tokens) -> dict[str, Work]:
    """The busiest rank's work over all layers, by step."""
    out = {WALK: _over(model, lambda shape: walk(shape, data))}
    for name, step in recipe.steps:
        out[name] = out.get(name, NOTHING) + _over(model, partial(step_work, step, data=data))
    return out


def _over(model: Model, of_layer: Callable[[LayerShape], Work]) -> Work:
    total = NOTHING
    for shape, layers in model.shapes.items():
        total += of_layer(shape).times(layers)
    return total


def with_own_rates(machine: Machine, model: Model, calibration: Calibration) -> Machine:
    """The machine with the rates of this one's CPU, measured with products of the model's width."""
    rows = calibration.on(machine).batch * calibration.length
    rates = measured_rates(rows, next(iter(model.shapes)).hidden)
    return replace(machine, rates=replace(rates, network=machine.network))
