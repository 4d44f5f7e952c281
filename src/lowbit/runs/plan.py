"""What a scheme means for a given model, settled and checked before any work.

Every linear gets its format here; a group size that does not divide a width, an override that matches nothing and
an architecture that is not known end a run before it starts.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import LowbitError, check_least, check_seed
from lowbit.models.skeleton import Skeleton
from lowbit.quant.compressed_tensors import layout_of, stock_loads
from lowbit.quant.format import usable_group_sizes
from lowbit.quant.scheme import ModelFormats, ModuleFormats, Scheme


@dataclass(frozen=True)
class Plan:
    """Formats of a model's modules.

    Attributes:
        formats: of each module that is quantized, and of Q, K and V.
        shapes: ``(out, in)`` of all linears, head and embedding.
        floats: linears (the head included) that stay float.
        embed, head: their module names.
        untie: embedding and head are one tensor in the source and two in the result, since one is rounded.
        layout: see ``packing``.
        quantized_weights: how many weights are rounded; ``float_weights``: how many are not.
        stored_bits: bits that codes, scales and zeros of the rounded weights take.
        stock: why stock ``transformers`` does not load the result, or ``None``.
    """

    formats: ModelFormats
    shapes: dict[str, tuple[int, int]]
    floats: tuple[str, ...]
    embed: str
    head: str
    untie: bool
    layout: str
    quantized_weights: int
    float_weights: int
    stored_bits: float
    stock: str | None

    @property
    def bits_per_weight(self) -> float:
        """Effective bits of a rounded weight: codes, scales and zeros over weights (nothing stays online here)."""
        return self.stored_bits / self.quantized_weights

    @property
    def model_bits_per_weight(self) -> float:
        """The same over the whole model, its float part counted at 16 bits."""
        return (self.stored_bits + 16 * self.float_weights) / (self.quantized_weights + self.float_weights)


def make_plan(skeleton: Skeleton, scheme: Scheme) -> Plan:
    """Settle every module's format; raises ``LowbitError`` where the scheme does not fit the model."""
    family = skeleton.family
    shapes = linear_shapes(skeleton)
    if not shapes:
        raise LowbitError("config.json says that the model has no layers: nothing to quantize")
    linears = {name: found for name in shapes if (found := scheme.module(name)) is not None}
    extra = _outside(scheme, family.head, family.embed)
    floats = [name for name in shapes if name not in linears]
    rows, columns = skeleton.model.get_input_embeddings().weight.shape
    shapes |= {family.head: (rows, columns), family.embed: (rows, columns)}
    for glob, _ in scheme.overrides:
        if not any(fnmatch.fnmatchcase(name, glob) for name in shapes):
            example = next(iter(shapes))
            raise LowbitError(f"override '{glob}' matches no module; names look like {example} or {family.head}")
    if not linears:
        raise LowbitError("the overrides leave every linear of the blocks in float: nothing to quantize")
    formats = ModelFormats({**linears, **extra}, scheme.kv)
    _check_groups(formats, shapes)
    count = {name: shape[0] * shape[1] for name, shape in shapes.items()}
    untie = skeleton.tied and bool(extra)
    if skeleton.tied and not untie:
        del count[family.head]
    weights = formats.weights
    return Plan(
        formats=formats,
        shapes=shapes,
        floats=tuple(name for name in [*floats, family.head] if name not in weights),
        embed=family.embed,
        head=family.head,
        untie=untie,
        layout=layout_of(formats),
        quantized_weights=sum(count[name] for name in weights),
        float_weights=sum(n for name, n in count.items() if name not in weights),
        stored_bits=sum(count[n] * format.bits_per_value(shapes[n][1]) for n, format in weights.items()),
        stock=stock_loads(formats, family.embed, two_d_inputs=family.flat_mlp),
    )


def _outside(scheme: Scheme, head: str, embed: str) -> dict[str, ModuleFormats]:
    """Formats of head and embedding where overrides name them; an embedding's input is token ids."""
    found = {name: scheme.outside(name) for name in (head, embed)}
    if (own := found[embed]) is not None:
        found[embed] = ModuleFormats(own.weight)
    return {name: formats for name, formats in found.items() if formats is not None}


def _check_groups(formats: ModelFormats, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse groups that do not divide a width."""
    weights = formats.weights
    for name, format in weights.items():
        width, size = shapes[name][1], format.group
        if size is not None and width % size:
            # A size that fits this width only would fail at the next one of the same format.
            widths = [shapes[other][1] for other, same in weights.items() if same == format]
            everywhere = usable_group_sizes(math.gcd(*widths))
            usable = ", ".join(map(str, everywhere or usable_group_sizes(width)))
            raise LowbitError(f"{name}: group size {size} does not divide a width of {width}; usable sizes: {usable}")


def check_sizes(samples: int, length: int, seed: int = 0) -> None:
    """Refuse numbers that no model could be calibrated with."""
    check_least("--samples", samples, 1, "give the number of calibration windows, such as 32")
    check_least("--length", length, 2, "give the number of tokens in a window, such as 512")
    check_seed(seed)


def check_length(config: Any, length: int) -> None:
    """Refuse windows beyond the model's positions."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and length > limit:
        raise LowbitError(f"--length {length} given; this model's positions end at {limit}: give {limit} or less")


def linear_shapes(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every linear of every block by full name."""
    family = skeleton.family
    out = {}
    for index, layer in enumerate(skeleton.layers):
        for name in (name for group in family.linears for name in group):
            shape = layer.get_parameter(f"{name}.weight").shape
            out[f"{family.blocks}.{index}.{name}"] = (shape[0], shape[1])
    return out
