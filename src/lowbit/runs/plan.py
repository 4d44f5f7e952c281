"""What a scheme means for a given model, settled and checked before any work.

Every linear gets its format here; a group size that does not divide a width, an override that matches nothing and
an architecture that is not known end a run before it starts.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from typing import Any

from lowbit.errors import LowbitError
from lowbit.models.skeleton import Skeleton
from lowbit.quant.affine import QuantSpec, usable_group_sizes
from lowbit.quant.compressed_tensors import layout_of, stock_loads
from lowbit.quant.scheme import Scheme


@dataclass(frozen=True)
class Plan:
    """Formats of a model's modules.

    Attributes:
        specs: format of each module that is rounded, by full name.
        shapes: ``(out, in)`` of all linears, head and embedding.
        floats: linears (the head included) that stay float.
        embed, head: their module names.
        untie: embedding and head are one tensor in the source and two in the result, since one is rounded.
        layout: see ``packing``.
        quantized_weights: how many weights are rounded; ``float_weights``: how many are not.
        stored_bits: bits that codes, scales and zeros of the rounded weights take.
        stock: why stock ``transformers`` does not load the result, or ``None``.
    """

    specs: dict[str, QuantSpec]
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
    specs: dict[str, QuantSpec | None] = {name: scheme.weight_spec(name) for name in shapes}
    extra = {family.head: _named(scheme, family.head), family.embed: _named(scheme, family.embed)}
    rows, columns = skeleton.model.get_input_embeddings().weight.shape
    shapes |= {family.head: (rows, columns), family.embed: (rows, columns)}
    for glob, _ in scheme.overrides:
        if not any(fnmatch.fnmatchcase(name, glob) for name in shapes):
            example = next(iter(shapes))
            raise LowbitError(f"override '{glob}' matches no module; names look like {example} or {family.head}")
    rounded = {name: spec for name, spec in {**specs, **extra}.items() if spec is not None}
    if not any(specs.values()):
        raise LowbitError("the overrides leave every linear of the blocks in float: nothing to quantize")
    for name, spec in rounded.items():
        width, size = shapes[name][1], spec.group_size
        if size is not None and width % size:
            # A size that fits this width only would fail at the next one of the same format.
            everywhere = usable_group_sizes(
                math.gcd(*(shapes[n][1] for n, other in rounded.items() if other == spec))
            )
            usable = ", ".join(map(str, everywhere or usable_group_sizes(width)))
            raise LowbitError(f"{name}: group size {size} does not divide a width of {width}; usable sizes: {usable}")
    count = {name: shape[0] * shape[1] for name, shape in shapes.items()}
    untie = skeleton.tied and any(extra.values())
    if skeleton.tied and not untie:
        del count[family.head]
    return Plan(
        specs=rounded,
        shapes=shapes,
        floats=tuple(name for name in [*specs, family.head] if name not in rounded),
        embed=family.embed,
        head=family.head,
        untie=untie,
        layout=layout_of(scheme),
        quantized_weights=sum(count[name] for name in rounded),
        float_weights=sum(n for name, n in count.items() if name not in rounded),
        stored_bits=sum(count[n] * spec.bits_per_value(shapes[n][1]) for n, spec in rounded.items()),
        stock=stock_loads(scheme, rounded, family.embed, two_d_inputs=family.flat_mlp),
    )


def check_sizes(samples: int, length: int, seed: int = 0) -> None:
    """Refuse numbers that no model could be calibrated with."""
    for name, given, least in (("samples", samples, 1), ("length", length, 2), ("seed", seed, 0)):
        if given < least:
            raise LowbitError(f"--{name} {given} given; it must be {least} or more")
    if seed >= 2**63:
        raise LowbitError(f"--seed {seed} given; it must be below 2**63")


def check_length(config: Any, length: int) -> None:
    """Refuse windows beyond the model's positions."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and length > limit:
        raise LowbitError(f"--length {length} given; this model's positions end at {limit}")


def linear_shapes(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every linear of every block by full name."""
    family = skeleton.family
    out = {}
    for index, layer in enumerate(skeleton.layers):
        for name in (name for group in family.linears for name in group):
            shape = layer.get_parameter(f"{name}.weight").shape
            out[f"{family.blocks}.{index}.{name}"] = (shape[0], shape[1])
    return out


def _named(scheme: Scheme, module: str) -> QuantSpec | None:
    """The format of a module outside of the blocks: float unless an override matches it."""
    found = scheme.override(module)
    return found[1] if found else None
