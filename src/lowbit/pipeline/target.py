"""What ``--target RUNTIME`` settles before any work: the scheme, and that the runtime can carry it and the recipe."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.errors import LowbitError
from lowbit.exporters import exporter_of
from lowbit.exporters.fit import check
from lowbit.exporters.run import Subject
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.recipe import Recipe, runtime_ops
from lowbit.quant.runtimes import RUNTIMES
from lowbit.quant.scheme import Scheme, for_runtime, parse_scheme, with_overrides
from lowbit.runs.plan import Plan, make_plan


def settle(
    runtime: str, given: Scheme | None, overrides: Mapping[str, str], recipe: Recipe, skeleton: Skeleton
) -> Scheme:
    """The scheme of a run for a runtime: the given one, or the first of the runtime's own that fits the model.

    Args:
        runtime: a name of ``RUNTIMES``.
        given: what a person or the recipe asked for, ``overrides`` included, or ``None``.
        overrides: ``{glob: format}``, put on a scheme of the runtime's own.
        recipe: what will be done; one that leaves something beside the model's graph is refused.
        skeleton: the model.

    Raises:
        LowbitError: nothing fits; one line that names the field and, where there is one, the nearest scheme.
    """
    own = [with_overrides(parse_scheme(name), overrides) for name in RUNTIMES[runtime].schemes]
    misfit = exporter_of(RUNTIMES[runtime].target).misfit
    refused: list[LowbitError] = []
    for candidate in [given] if given else own:
        scheme = for_runtime(candidate, runtime)
        try:
            check(runtime, misfit, subject_of(make_plan(skeleton, scheme), scheme, recipe, skeleton))
        except LowbitError as error:
            refused.append(error)
        else:
            return scheme
    raise refused[-1]  # the least demanding of them: its reason is not the size of its groups


def subject_of(plan: Plan, scheme: Scheme, recipe: Recipe, skeleton: Skeleton) -> Subject:
    """What a run will be, as exporters ask about it."""
    floats = tuple(name for name in plan.floats if name != plan.head)
    shapes = {name: plan.shapes[name] for name in (*plan.formats.modules, *floats)}
    return Subject(skeleton.config, scheme, plan.formats, shapes, floats, runtime_ops(recipe, scheme.act))
