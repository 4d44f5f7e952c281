"""The plan: a scheme resolved and checked for a given model, before any work.

Every linear gets its format here. A group size that does not divide a width, an override that matches nothing and an
unknown architecture are errors.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lowbit.checkpoints.positions import positions_of
from lowbit.errors import LowbitError, check_least, check_seed
from lowbit.models.architecture import Architecture
from lowbit.models.build import empty_model, text_config
from lowbit.models.skeleton import Skeleton
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import group_advice
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme import ModelFormats, ModuleFormats, Scheme
from lowbit.quant.scheme_names import override_text
from lowbit.quant.static_activations import StaticActs
from lowbit.runs.stock import dense_where_needed, why_not_stock


@dataclass(frozen=True)
class Plan:
    """Formats of a model's modules.

    Attributes:
        architecture: the model's.
        formats: formats of the quantized modules and of Q, K and V.
        shapes: ``(out, in)`` of all linears, head and embedding.
        floats: linears (the head included) that stay float.
        outside: linears of other parts than the text model; they stay float.
        kept: parameters of experts that stay float.
        embed, head: their module names.
        tied: embedding and head are one tensor in the result.
        untie: they are one tensor in the source and two in the result, since either is quantized.
        quantized_weights: number of quantized weights; ``float_weights``: of float ones.
        stored_bits: stored bits of the quantized weights' codes, scales and zero points.
        size_bytes: size of the quantized weights on disk, where codes may take a byte each.
        stock: why stock ``transformers`` does not load the result, or ``None``.
    """

    architecture: Architecture
    formats: ModelFormats
    shapes: dict[str, tuple[int, int]]
    floats: tuple[str, ...]
    outside: tuple[str, ...]
    kept: tuple[str, ...]
    embed: str
    head: str
    tied: bool
    untie: bool
    quantized_weights: int
    float_weights: int
    stored_bits: float
    size_bytes: int
    stock: str | None

    @property
    def bits_per_weight(self) -> float:
        """Effective bits per quantized weight: codes, scales and zero points, without runtime ops."""
        return self.stored_bits / self.quantized_weights

    @property
    def model_bits_per_weight(self) -> float:
        """The same over the whole model, with its float part counted at 16 bits."""
        return (self.stored_bits + 16 * self.float_weights) / (self.quantized_weights + self.float_weights)


def make_plan(skeleton: Skeleton, scheme: Scheme) -> Plan:
    """Resolve every module's format; raises ``LowbitError`` where the scheme does not fit the model."""
    architecture = skeleton.architecture
    shapes = linear_shapes(skeleton)
    if not shapes:
        raise LowbitError("the model of config.json has no layers: nothing to quantize")
    routers = architecture.routers()
    planned = {
        name: None if name in routers and not scheme.override(name) else scheme.module(name) for name in shapes
    }
    linears = {
        name: replace(formats, expert=architecture.is_experts(name))
        for name, formats in planned.items()
        if formats is not None
    }
    embeddings = _formats_outside_blocks(scheme, architecture.head, architecture.embed)
    floats = [name for name in shapes if name not in linears]
    rows, columns = skeleton.model.get_input_embeddings().weight.shape
    shapes |= {architecture.head: (rows, columns), architecture.embed: (rows, columns)}
    for glob, _ in scheme.overrides:
        if glob not in shapes and not any(fnmatch.fnmatchcase(name, glob) for name in shapes):
            example = next(iter(shapes))
            raise LowbitError(
                f"override '{glob}' matches no module; names look like {example} or {architecture.head}"
            )
    if not linears:
        raise LowbitError("the overrides leave every linear of the blocks in float: nothing to quantize")
    unlisted = _unlisted(skeleton)
    shapes |= unlisted
    if scheme.kv is not None and all(kind.attention is None for kind in architecture.layers):
        raise LowbitError(
            f"{scheme.name} quantizes Q, K and V, and no layer of this model has an attention function to do it in: "
            "choose a scheme without kv"
        )
    model_formats = dense_where_needed(skeleton, ModelFormats({**linears, **embeddings}, scheme.kv))
    _check_inputs_of_experts(model_formats)
    _check_groups(scheme, model_formats, shapes)
    outside, kept = _outside(skeleton), _kept(skeleton)
    count = {name: shape[0] * shape[1] for name, shape in (shapes | outside).items()}
    untie = skeleton.tied and bool(embeddings)
    if skeleton.tied and not untie:
        del count[architecture.head]
    weights = model_formats.weights
    return Plan(
        architecture=architecture,
        formats=model_formats,
        shapes=shapes,
        floats=tuple(name for name in [*floats, *unlisted, architecture.head] if name not in weights),
        outside=tuple(outside),
        kept=tuple(kept),
        embed=architecture.embed,
        head=architecture.head,
        tied=skeleton.tied and not untie,
        untie=untie,
        quantized_weights=sum(count[name] for name in weights),
        float_weights=sum(n for name, n in count.items() if name not in weights) + sum(kept.values()),
        stored_bits=sum(count[n] * format.bits_per_value(shapes[n][1]) for n, format in weights.items()),
        size_bytes=sum(
            int(count[name] * own.layout.bits_per_value(own.weight, shapes[name][1]) / 8)
            for name, own in model_formats.modules.items()
        ),
        stock=why_not_stock(skeleton, model_formats),
    )


def _check_inputs_of_experts(formats: ModelFormats) -> None:
    """Refuse static inputs of experts: one that no calibration token reaches would have no range."""
    for name, own in formats.modules.items():
        if own.expert and isinstance(own.input, StaticActs):
            raise LowbitError(
                f"{name} is an expert's and would have inputs in {own.input.name}, whose range an expert that no "
                "token reaches does not have: choose a scheme with dynamic or float inputs, or override experts"
            )


def _formats_outside_blocks(scheme: Scheme, head: str, embed: str) -> dict[str, ModuleFormats]:
    """Formats of head and embedding if overrides match them; an embedding's input is token ids."""
    outside = {name: scheme.outside(name) for name in (head, embed)}
    if (embedding := outside[embed]) is not None:
        outside[embed] = ModuleFormats(embedding.weight, outside=True)
    return {name: formats for name, formats in outside.items() if formats is not None}


def _check_groups(scheme: Scheme, formats: ModelFormats, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse groups of weights and of inputs that do not divide a width."""
    weights = formats.weights
    for name, format in weights.items():
        width, size = shapes[name][1], format.group
        if (inputs := formats.input(name)) is not None:
            _check_input(scheme, name, inputs, width)
        if width % format.width_unit and not isinstance(format, IntFormat):
            raise LowbitError(
                f"{name}: {format.name} needs widths in multiples of {format.width_unit}, and this one is {width}: "
                f"give it another format, such as --override '{_glob_of(scheme, name)}=w8', or choose another scheme"
            )
        if size is not None and width % size and not format.smaller_last_group:
            # Suggested sizes divide the widths of all linears of the same format.
            same = {other: shapes[other][1] for other, other_format in weights.items() if other_format == format}
            advice = group_advice(math.gcd(*same.values())) or _without_groups(scheme, name, size, same)
            raise LowbitError(f"{name}: group size {size} does not divide a width of {width}; {advice}")


def _check_input(scheme: Scheme, name: str, inputs: ActFormat, width: int) -> None:
    try:
        inputs.check_width(width)
    except LowbitError as error:
        raise LowbitError(f"{name}: {error}, --override '{_glob_of(scheme, name)}=float'") from error


def _glob_of(scheme: Scheme, name: str) -> str:
    """The override that gives a module its format, or a glob for modules of its kind."""
    override = scheme.override(name)
    return f"*.{name.rpartition('.')[2]}" if override is None else override[0]


def _without_groups(scheme: Scheme, name: str, size: int, widths: Mapping[str, int]) -> str:
    """What to do where no group size fits all linears of a format, as options of the command line.

    Args:
        scheme: the scheme.
        name: a linear whose width ``size`` does not divide.
        size: the group size.
        widths: of all linears of that format, by full name.
    """
    none = f"no size from 16 to 256 divides {' and '.join(map(str, sorted(set(widths.values()))))}"
    if (override := scheme.override(name)) is not None:
        per_row = override_text(override[1]).replace(f"g{size}", "")
        return f"{none}: use one scale per row, --override '{override[0]}={per_row}'"
    per_row = scheme.weight.name.replace(f"g{size}", "")
    kinds = dict.fromkeys(other.rpartition(".")[2] for other, width in widths.items() if width % size)
    options = " ".join(f"--override '*.{kind}={per_row}'" for kind in kinds)
    return f"{none}: use one scale per row, --scheme {scheme.name.replace(f'g{size}', '')}, or only there: {options}"


def check_sizes(samples: int, length: int, seed: int = 0) -> None:
    """Refuse invalid numbers of calibration windows and tokens, and an invalid seed."""
    check_least("--samples", samples, 1, "give the number of calibration windows, such as 32")
    check_least("--length", length, 2, "give the number of tokens in a window, such as 512")
    check_seed(seed)


def check_length(config: Any, length: int) -> None:
    """Refuse windows that are longer than the model's positions."""
    limit = positions_of(text_config(config))
    if limit is not None and limit < length:
        raise LowbitError(f"--length is {length}; this model's positions end at {limit}: give {limit} or less")


def linear_shapes(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every linear of every block by full name."""
    architecture, out = skeleton.architecture, {}
    for index, kind in enumerate(architecture.layers):
        parameters = skeleton.parameter_shapes(index)
        for name in kind.linears:
            rows, columns = parameters[f"{name}.weight"]
            shape = (columns, rows) if name in kind.transposed else (rows, columns)
            out[f"{architecture.blocks}.{index}.{name}"] = shape
    return out


def _unlisted(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of linears that stay float: of layers those that the architecture does not list, and all outside.

    Outside the layers are, but for the head, such as Gemma 4's, which projects what its layers read of the text.
    """
    architecture = skeleton.architecture
    outside = {n: m for n, m in skeleton.model.named_modules() if isinstance(m, nn.Linear) and n != architecture.head}
    out = {name: (module.weight.shape[0], module.weight.shape[1]) for name, module in outside.items()}
    for index, (layer, kind) in enumerate(zip(skeleton.layers, architecture.layers, strict=True)):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and name not in kind.linears:
                out[f"{architecture.blocks}.{index}.{name}"] = (module.weight.shape[0], module.weight.shape[1])
    return out


def _kept(skeleton: Skeleton) -> dict[str, int]:
    """Number of weights in each parameter of experts that stays float."""
    architecture = skeleton.architecture
    return {
        f"{architecture.blocks}.{index}.{name}": layer.get_parameter(name).numel()
        for index, (layer, kind) in enumerate(zip(skeleton.layers, architecture.layers, strict=True))
        for name in kind.kept
    }


def _outside(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of the linears of the model's other parts."""
    if not skeleton.architecture.text_model:
        return {}
    model = empty_model(skeleton.config, skeleton.trusted)
    return {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and skeleton.architecture.is_outside(name)
    }
