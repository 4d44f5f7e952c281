"""Bytes of the weights of a run folder, or of a folder with the same layout: its ``.safetensors`` files.

A file is a header of one JSON entry for each tensor, and the tensors. Entries are counted with the longest offsets,
so that the sum is an upper bound: a file is smaller by a few bytes for each tensor. Config and tokenizer are not
counted, as no choice changes them and every loader has them beside the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowbit.errors import LowbitError
from lowbit.exporters.footprint import Choice, FloatModel, Footprint, Option
from lowbit.exporters.offered import Refuses, offered
from lowbit.models.skeleton import Skeleton
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.layout import Stored
from lowbit.runs.carried import CARRIED

FORMATS: tuple[Format, ...] = tuple(IntFormat(bits, group) for bits in range(2, 9) for group in (128, 64, 32))
SHARD = 64  # bytes of a shard's header without entries, padded
DIGITS = 12  # of the longest offset


def footprint(
    model: FloatModel, skeleton: Skeleton, groups: Sequence[tuple[str, ...]], refuses: Refuses, runtime: str | None
) -> Footprint:
    """The footprint of a folder.

    Args:
        model: the float model.
        skeleton: the same without parameters.
        groups: modules that have one format, those of all blocks.
        refuses: why the target has no place for a plan.
        runtime: the target runtime of the run, which may decide on the dtype of scales.

    Raises:
        LowbitError: the target has no format for the experts, which do not stay float beside quantized linears, or
            none for any linear.
    """
    blocks = skeleton.architecture.blocks
    outside = [(model.embed, model.head)] if model.tied else [(model.embed,), (model.head,)]
    known: dict[tuple[object, ...], _Sizes] = {}
    choices = []
    for modules in (*groups, *outside):
        key = tuple((name.rpartition(".")[2], model.shape(name)) for name in modules)
        if key not in known:
            known[key] = _options(model, skeleton, modules, refuses, runtime)
        if not known[key].of and any(map(skeleton.architecture.is_experts, modules)):
            raise _without("this model's experts", known[key].why)
        choices.append(_choice(model, blocks, modules, known[key].of))
    inside = [choice for choice in choices if choice.modules[0] in model.modules]
    if all(option.format is None for choice in inside for option in choice.options):
        raise _without("any linear of this model", next(sizes.why for sizes in known.values()))
    own = {f"{name}.weight" for modules in (*groups, *outside) for name in modules}
    floats = {name: _float_size(model, blocks, name) for name in model.shapes if name not in own}
    floats |= {CARRIED: model.carried} if model.carried else {}
    fixed = sum(floats.values()) + SHARD * (len(skeleton.layers) + 1)
    largest = sorted(floats.items(), key=lambda pair: -pair[1])[:3]
    return Footprint(fixed, tuple(choices), tuple(largest))


@dataclass(frozen=True)
class _Sizes:
    """Formats with their bytes, and why the last one that was refused is."""

    of: list[tuple[Format, int]]
    why: str


def _without(what: str, why: str) -> LowbitError:
    return LowbitError(f"the target has no format for {what}: {why}; choose another, such as llama.cpp")


def _options(
    model: FloatModel, skeleton: Skeleton, modules: tuple[str, ...], refuses: Refuses, runtime: str | None
) -> _Sizes:
    out, found = [], offered(skeleton, modules, FORMATS, refuses, runtime)
    for format, plan in found.plans.items():
        size = 0
        for name in modules:
            own, shape = plan.formats.modules[name], model.shape(name)
            size += entries(name, own.layout.stored(own.weight, *shape))
        out.append((format, size))
    return _Sizes(out, found.why)


def _choice(
    model: FloatModel, blocks: str, modules: tuple[str, ...], options: Sequence[tuple[Format, int]]
) -> Choice:
    weights = sum(math.prod(model.shape(name)) for name in modules)
    if outside := modules[0] in (model.embed, model.head):
        weights = math.prod(model.shape(modules[0]))
    found = [Option(format, size) for format, size in options]
    if outside or not found:
        names = modules[:1] if outside else modules
        found.append(Option(None, sum(_float_size(model, blocks, f"{name}.weight") for name in names)))
    return Choice(modules, weights, tuple(found))


def _float_size(model: FloatModel, blocks: str, name: str) -> int:
    """A tensor in float: those of blocks are float32, all others as the model has them."""
    inside = name.startswith(f"{blocks}.") or model.checkpoint.find(name) is None
    item = 4 if inside else model.checkpoint.read([name])[name].element_size()
    return _entry(name, model.shapes[name]) + item * math.prod(model.shapes[name])


def entries(module: str, stored: Mapping[str, Stored]) -> int:
    """Bytes of a module's tensors and of their entries in the header."""
    return sum(
        _entry(f"{module}.{key}", one.shape) + one.dtype.itemsize * math.prod(one.shape)
        for key, one in stored.items()
    )


def _entry(name: str, shape: Sequence[int]) -> int:
    """Bytes of an entry with the longest offsets.

    >>> _entry("a", (2, 3))
    78
    """
    offsets = [10**DIGITS - 1] * 2
    entry = {name: {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}}
    return len(json.dumps(entry, separators=(",", ":"))) - 1
