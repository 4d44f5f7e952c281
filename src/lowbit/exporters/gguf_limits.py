"""What a ``.gguf`` file can hold: formats of weights, and architectures that llama.cpp has."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGMLQuantizationType as Kind

from lowbit.checkpoints.gguf_types import AnyKind
from lowbit.exporters.fit import Misfit, no_activations, weight_misfit
from lowbit.exporters.gguf_architectures.text_models import text_model
from lowbit.exporters.gguf_blocks import block_type
from lowbit.exporters.gguf_model import architecture, unlike_llamacpp
from lowbit.exporters.gguf_native import native_type
from lowbit.exporters.gguf_tensors import (
    stack_of,
    straddles,
)
from lowbit.exporters.run import Subject
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat


def limits(subject: Subject) -> Misfit | None:
    """llama.cpp's own formats, integers whose signed codes fit a block type, FP8 as floats; activations in float."""
    subject = of_text(subject)
    if (why := unlike_llamacpp(subject.config)) is not None:
        return Misfit("architecture", why)
    misfit = no_activations(subject, "llama.cpp quantizes them to its own 8-bit blocks")
    if misfit is not None:
        return misfit
    for module, format in subject.weights.items():
        kind = type_of(format, subject.shapes[module][1])
        if isinstance(kind, str):
            return weight_misfit(subject, module, kind)
        if (why := straddles(subject.config, module, format)) is not None:
            return weight_misfit(subject, module, why)
        if kind == Kind.NVFP4 and not architecture(subject.config).tensor_scales:
            name = architecture(subject.config).name
            return weight_misfit(subject, module, f"llama.cpp's {name} does not apply the scale of an NVFP4 tensor")
    return _mixed_stack(subject)


def of_text(subject: Subject) -> Subject:
    """The same with the config of the text model, where a model has other parts; names stay the model's."""
    return replace(subject, config=text_model(subject.config))


def _mixed_stack(subject: Subject) -> Misfit | None:
    """Experts' matrices that one tensor is to hold, in several formats."""
    seen: dict[str, tuple[str, Format | None]] = {}
    for module in (*subject.weights, *subject.floats):
        if (place := stack_of(f"{module}.weight")) is None:
            continue
        first, format = seen.setdefault(place[0], (module, subject.weights.get(module)))
        if format != subject.weights.get(module):
            why = f"llama.cpp has one tensor for it and for {first}, whose format is another"
            return weight_misfit(subject, module, why)
    return None


def type_of(format: Format, columns: int) -> AnyKind | str | None:
    """The type of blocks that holds a format exactly, or why there is none; ``None``: floats hold it."""
    if isinstance(format, IntFormat):
        return block_type(format, columns)
    if (kind := native_type(format, columns)) is not None or isinstance(format, FloatFormat):
        return kind
    return f"llama.cpp has no type for {format.name}"
