"""What a target has for a model: the footprint of its file, and the formats in it."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.errors import LowbitError, canonical
from lowbit.exporters import exporter_of
from lowbit.exporters.footprint import FloatModel, Footprint
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import shapes_of
from lowbit.pipeline.opened import Opened
from lowbit.pipeline.recipe import load_recipe
from lowbit.pipeline.request import model_name
from lowbit.pipeline.target import subject_of
from lowbit.quant.runtimes import RUNTIMES
from lowbit.quant.scheme import parse_scheme
from lowbit.runs.plan import linear_shapes, make_plan


def _gguf(model: FloatModel, pre: str | None) -> Footprint:
    from lowbit.exporters.gguf_footprint import footprint

    return footprint(model, pre)


# By target runtime, how it stores a model; the names are those of ``quantize --target``.
FOOTPRINTS: dict[str, Callable[[FloatModel, str | None], Footprint]] = {"llama.cpp": _gguf}


def target_of(given: str) -> str:
    """The target of that name, in any case; an unknown one raises an error that lists the known ones."""
    return canonical("target", given, FOOTPRINTS)


def footprint_of(target: str, model: str, opened: Opened, pre: str | None = None) -> Footprint:
    """The footprint of a model that was opened as ``model`` in a target's file."""
    skeleton = opened.skeleton
    architecture = skeleton.architecture
    _check_architecture(target, skeleton)
    routers = architecture.routers()  # float unless somebody asks: what they choose is no matter of bits
    facts = FloatModel(
        opened.config,
        opened.source.folder,
        model_name(model),
        opened.checkpoint,
        {name: tuple(shape) for name, shape in shapes_of(skeleton).items()},
        {name: shape for name, shape in linear_shapes(skeleton).items() if name not in routers},
        architecture.embed,
        architecture.head,
        skeleton.tied,
    )
    return FOOTPRINTS[target](facts, pre)


def _check_architecture(target: str, skeleton: Skeleton) -> None:
    """Refuse a model that the target does not compute in any format."""
    scheme = parse_scheme("w8a16-sym")
    subject = subject_of(make_plan(skeleton, scheme), scheme, load_recipe("rtn"), skeleton)
    misfit = exporter_of(RUNTIMES[target].target).misfit(subject)
    if misfit is not None and misfit.field == "architecture":
        raise LowbitError(f"{target} does not support this model: {misfit.why}")
