"""Resolves ``--target RUNTIME``: picks the scheme and checks that the runtime supports it and the recipe."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.errors import LowbitError
from lowbit.exporters import exporter_of
from lowbit.exporters.fit import check
from lowbit.exporters.run import Subject
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.recipe import Recipe, runtime_ops
from lowbit.quant.integer import IntFormat
from lowbit.quant.runtimes import RUNTIMES
from lowbit.quant.scale_dtype import suffix_of
from lowbit.quant.scheme import Scheme, for_runtime
from lowbit.quant.scheme_names import override_text, parse_scheme, with_overrides
from lowbit.runs.plan import Plan, make_plan


def settle(
    runtime: str, given: Scheme | None, overrides: Mapping[str, str], recipe: Recipe, skeleton: Skeleton
) -> Scheme:
    """The scheme of a run for a target runtime: ``given``, or the first of the runtime's schemes that fits the model.

    Args:
        runtime: a name of ``RUNTIMES``.
        given: the scheme of the user or the recipe, ``overrides`` included, or ``None``.
        overrides: ``{glob: format}``, applied to the runtime's schemes.
        recipe: the recipe; refused if it leaves runtime ops that the runtime does not support.
        skeleton: the model.

    Raises:
        LowbitError: no scheme fits; one line with the field and, if there is one, the nearest scheme. A dtype of
            scales that the runtime does not store was asked for.
    """
    if given is not None:
        _check_scales(runtime, given)
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
    raise refused[-1]  # the last scheme is the least demanding: its misfit is not the group size


def _check_scales(runtime: str, scheme: Scheme) -> None:
    """Refuse a dtype of scales that a user has named and the runtime would replace by its own."""
    own = RUNTIMES[runtime].scale_dtype
    for format in (scheme.weight, *(spec for _, spec in scheme.overrides)):
        if isinstance(format, IntFormat) and (suffix := suffix_of(format)) and format.scale_dtype != own:
            raise LowbitError(
                f"{override_text(format)} given with --target {runtime}, which stores scales as {own}: leave out "
                f"'{suffix}'"
            )


def subject_of(plan: Plan, scheme: Scheme, recipe: Recipe, skeleton: Skeleton) -> Subject:
    """The planned run in the form that exporters check."""
    floats = tuple(name for name in plan.floats if name != plan.head)
    shapes = {name: plan.shapes[name] for name in (*plan.formats.modules, *floats)}
    return Subject(skeleton.config, scheme, plan.formats, shapes, floats, runtime_ops(recipe, scheme.act))
