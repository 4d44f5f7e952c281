"""Bytes of exports that keep every linear of the blocks packed and everything else in float32: ONNX and ExecuTorch.

Tensors are counted to the byte, the graph beside them by an upper bound for each layer, so that the sum is an upper
bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowbit.errors import LowbitError
from lowbit.exporters.footprint import Choice, FloatModel, Footprint, Option
from lowbit.exporters.offered import Refuses, offered
from lowbit.models.skeleton import Skeleton
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class PackedLinears:
    """How a target stores a model.

    Attributes:
        runtime: the target runtime.
        formats: candidates for every module.
        size: bytes of a weight ``(out, in)`` in a format.
        embedding: the same for the embedding; ``None``: it stays float.
        graph: bytes beside tensors, at most: of the whole, and of each layer.
        tied_twice: a matrix that embedding and head share is stored twice.
    """

    runtime: str
    formats: Sequence[IntFormat]
    size: Callable[[IntFormat, tuple[int, int]], int]
    embedding: Callable[[IntFormat, tuple[int, int]], int] | None
    graph: tuple[int, int]
    tied_twice: bool


def footprint(
    model: FloatModel,
    skeleton: Skeleton,
    groups: Sequence[tuple[str, ...]],
    refuses: Refuses,
    stores: PackedLinears,
    extra: int = 0,
) -> Footprint:
    """The footprint of an export.

    Args:
        model: the float model.
        skeleton: the same without parameters.
        groups: linears of the blocks that have one format.
        refuses: why the target has no place for a plan.
        stores: how the target stores it.
        extra: bytes of tensors that are no parameters.

    Raises:
        LowbitError: the target has no format for some linear of the blocks, and none of them may stay float.
    """
    outside = [(model.embed, model.head)] if model.tied else [(model.embed,), (model.head,)]
    known: dict[tuple[object, ...], tuple[Option, ...]] = {}
    choices = []
    for modules in (*groups, *outside):
        key = tuple((name.rpartition(".")[2], model.shape(name)) for name in modules)
        if key not in known:
            known[key] = _options(model, skeleton, modules, refuses, stores)
        counted = modules[:1] if modules in outside else modules  # a tied matrix once
        weights = sum(math.prod(model.shape(name)) for name in counted)
        choices.append(Choice(modules, weights, known[key]))
    own = {f"{name}.weight" for choice in choices for name in choice.modules}
    floats = {name: FLOAT * math.prod(shape) for name, shape in model.shapes.items() if name not in own}
    whole, layer = stores.graph
    fixed = sum(floats.values()) + extra + whole + layer * len(skeleton.layers)
    largest = sorted(floats.items(), key=lambda pair: -pair[1])[:3]
    return Footprint(fixed, tuple(choices), tuple(largest))


def _options(
    model: FloatModel, skeleton: Skeleton, modules: tuple[str, ...], refuses: Refuses, stores: PackedLinears
) -> tuple[Option, ...]:
    embedded, inside = model.embed in modules, modules[0] in model.modules
    candidates: Sequence[Format] = () if embedded and stores.embedding is None else stores.formats
    found = offered(skeleton, modules, candidates, refuses, stores.runtime)
    out = [
        Option(format, sum(_size(model, name, format, stores) for name in modules))
        for format in found.plans
        if isinstance(format, IntFormat)
    ]
    if not inside:
        copies = len(modules) if stores.tied_twice else 1
        out.append(Option(None, copies * FLOAT * math.prod(model.shape(modules[0]))))
    if not out:
        raise LowbitError(
            f"{stores.runtime} has no format for a linear, and no linear of its blocks stays float: {found.why}; "
            "choose a target that leaves it float, such as transformers"
        )
    return tuple(out)


def _size(model: FloatModel, module: str, format: IntFormat, stores: PackedLinears) -> int:
    size = stores.embedding if module == model.embed else stores.size
    assert size is not None, "an embedding without formats has no candidates"
    return size(format, model.shape(module))
