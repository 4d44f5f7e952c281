"""What a target has for a model: the footprint of its file, and the formats in it."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.errors import canonical
from lowbit.exporters.footprint import FloatModel, Footprint
from lowbit.models.validate import shapes_of
from lowbit.pipeline.opened import Opened
from lowbit.pipeline.request import model_name
from lowbit.runs.plan import linear_shapes


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
    facts = FloatModel(
        opened.config,
        opened.source.folder,
        model_name(model),
        opened.checkpoint,
        {name: tuple(shape) for name, shape in shapes_of(skeleton).items()},
        linear_shapes(skeleton),
        architecture.embed,
        architecture.head,
        skeleton.tied,
    )
    return FOOTPRINTS[target](facts, pre)
