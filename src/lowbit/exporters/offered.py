"""The formats that a target has for some modules of a model: each is planned and shown to the target's own limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from lowbit.errors import LowbitError
from lowbit.exporters.fit import Misfit
from lowbit.models.skeleton import Skeleton
from lowbit.quant.format import Format
from lowbit.quant.scheme import Scheme, for_runtime
from lowbit.quant.scheme_names import parse_scheme
from lowbit.runs.plan import Plan, make_plan

BASE = "w8a16-sym"  # of the modules beside the ones that are asked about: no group that could fail to divide a width
Refuses = Callable[[Plan, Scheme], Misfit | None]


@dataclass(frozen=True)
class Offered:
    """What a target has for some modules.

    Attributes:
        plans: by format, as asked for, the plan with all modules in it.
        why: why the last format that was refused is; empty where none was.
    """

    plans: dict[Format, Plan]
    why: str


def offered(
    skeleton: Skeleton, modules: tuple[str, ...], formats: Iterable[Format], refuses: Refuses, runtime: str | None
) -> Offered:
    """Those of ``formats`` that a target has for modules which get one format.

    Args:
        skeleton: the model.
        modules: full names.
        formats: candidates.
        refuses: why the target has no place for a plan; ``None``: it has.
        runtime: the target runtime of the run, which may decide on the dtype of scales.
    """
    plans, why = dict[Format, Plan](), ""
    for format in formats:
        scheme = replace(parse_scheme(BASE), overrides=tuple((name, format) for name in modules))
        scheme = for_runtime(scheme, runtime)
        try:
            plan = make_plan(skeleton, scheme)
        except LowbitError as error:  # a group that does not divide the width
            why = str(error)
            continue
        if (misfit := refuses(plan, scheme)) is None:
            plans[format] = plan
        else:
            why = misfit.why
    return Offered(plans, why)
