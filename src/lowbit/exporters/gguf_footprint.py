"""Bytes of a ``.gguf`` file, exact for every choice of formats: header, metadata, and tensors padded to 32 bytes.

Formats are those that ``gguf.type_of`` has a type for, by ascending bytes. NVFP4 and MXFP4 are not among them: beside
them the scales of integers are stored as bfloat16, which blocks do not hold.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind

from lowbit.checkpoints.gguf_types import AnyKind, bytes_of
from lowbit.errors import LowbitError
from lowbit.exporters.footprint import Choice, FloatModel, Footprint, Option
from lowbit.exporters.gguf import IN_F32, add_value, declare
from lowbit.exporters.gguf_architectures.text_models import text_model
from lowbit.exporters.gguf_floats import MATRIX_ORDER, exact_type
from lowbit.exporters.gguf_limits import type_of
from lowbit.exporters.gguf_model import architecture, model_metadata
from lowbit.exporters.gguf_rope import rope_tensors
from lowbit.exporters.gguf_tensors import FileTensor, file_tensors, stored_value, straddles
from lowbit.exporters.gguf_tokenizer import tokenizer_metadata
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import K_QUANTS
from lowbit.quant.tables import IQ4_NL, Q2_0

ALIGNMENT = 32
FORMATS: tuple[Format, ...] = (
    Q2_0, K_QUANTS["q2_k"], K_QUANTS["q3_k"], IQ4_NL, IntFormat(4, 32), K_QUANTS["q4_k"], IntFormat(5, 32),
    K_QUANTS["q5_k"], K_QUANTS["q6_k"], IntFormat(8, 32),
)  # fmt: skip


def footprint(model: FloatModel, pre: str | None = None) -> Footprint:
    """The file's footprint; ``pre`` as for an export. Of a model with other parts the file has the text model alone.

    Raises:
        LowbitError: llama.cpp has no equivalent of the tokenizer.
    """
    model = replace(model, config=text_model(model.config))
    tensors = _tensors(model)
    members = _members(model, tensors)
    choices, floats = list[Choice](), dict[str, int]()
    inside = {id(tensor) for group in members.values() for tensor in group}
    for tensor in tensors:
        if id(tensor) not in inside:
            floats[tensor.name] = _size(model, tensor, _float_kind(model, tensor))
    for modules, group in members.items():
        choices.append(_choice(model, modules, group))
    fixed = _header(model, tensors, pre) + sum(map(padded, floats.values()))
    largest = sorted(floats.items(), key=lambda pair: -pair[1])[:3]
    return Footprint(fixed, tuple(choices), tuple(largest))


def padded(size: int) -> int:
    """Bytes up to the next multiple of ``ALIGNMENT``.

    >>> padded(64), padded(65)
    (64, 96)
    """
    return -(-size // ALIGNMENT) * ALIGNMENT


def _tensors(model: FloatModel) -> list[FileTensor]:
    """The file's tensors; a tied head is not among them, whatever its format."""
    rope = [FileTensor(name, (name,)) for name in rope_tensors(model.config)]
    return [*rope, *file_tensors(model.config, model.shapes)]


def _members(model: FloatModel, tensors: Sequence[FileTensor]) -> dict[tuple[str, ...], list[FileTensor]]:
    """The tensors of each set of modules that has one format: of a stack all parts, of shares all shares."""
    out: dict[tuple[str, ...], list[FileTensor]] = {}
    for tensor in tensors:
        modules = [model.module_of(name) for name in tensor.parts]
        if all(module is not None for module in modules):
            names = tuple(module for module in modules if module is not None)
            out.setdefault(names, []).append(tensor)
    return out


def _choice(model: FloatModel, modules: tuple[str, ...], tensors: Sequence[FileTensor]) -> Choice:
    rows, columns = model.shape(modules[0])
    sizes: dict[Format | None, int] = {}
    for format in FORMATS:
        kind = type_of(format, columns)
        if kind is None or isinstance(kind, str):
            continue
        if any(straddles(model.config, module, format) for module in modules):
            continue
        sizes[format] = sum(padded(_size(model, tensor, kind)) for tensor in tensors)
    outside = modules[0] in (model.embed, model.head)
    if outside or not sizes:  # linears of blocks lose next to nothing at eight bits
        sizes[None] = sum(padded(_size(model, tensor, _float_kind(model, tensor))) for tensor in tensors)
    if outside and architecture(model.config).head == "tied":
        sizes = {None: sizes[None]}  # a run with a quantized embedding has a head beside it, and the graph has none
    names = (model.embed, model.head) if model.tied and modules == (model.embed,) else modules
    options = tuple(Option(format, size) for format, size in sizes.items())
    return Choice(names, len(modules) * rows * columns, options)


def _size(model: FloatModel, tensor: FileTensor, kind: AnyKind) -> int:
    return bytes_of(_shape(model, tensor), kind)


def _shape(model: FloatModel, tensor: FileTensor) -> tuple[int, ...]:
    """A tensor's shape in the file, which may be another than the model's: some vectors are stored as columns."""
    name = tensor.parts[0]
    if (divisors := rope_tensors(model.config).get(name)) is not None:
        return tuple(divisors.shape)
    module = model.module_of(name)
    own_shape = model.shapes[name] if module is None else model.shape(module)
    rows, *rest = stored_value(model.config, name, torch.empty(own_shape, device="meta")).shape
    own = (rows if tensor.share is None else tensor.share.stop - tensor.share.start, *rest)
    return (len(tensor.parts), *own) if tensor.stacked else own


def _float_kind(model: FloatModel, tensor: FileTensor) -> AnyKind:
    """The type of floats that the export takes: F32, or for matrices the smallest that holds every value."""
    if tensor.name.endswith(IN_F32) or len(_shape(model, tensor)) == 1:
        return Kind.F32
    order = list(MATRIX_ORDER)
    return max((exact_type(value, MATRIX_ORDER) for value in _values(model, tensor)), key=order.index)


def _values(model: FloatModel, tensor: FileTensor) -> Iterator[Any]:
    for name in tensor.parts:
        if model.checkpoint.find(name) is not None:
            (value,) = model.checkpoint.read([name]).values()
            yield stored_value(model.config, name, value.float())


def _header(model: FloatModel, tensors: Sequence[FileTensor], pre: str | None) -> int:
    """Bytes before the first tensor's data, by writing them."""
    vocabulary = model.config.vocab_size
    tokens, _ = tokenizer_metadata(model.folder, vocabulary, pre)
    metadata: Mapping[str, Any] = model_metadata(model.config, model.name) | {"general.file_type": 0} | tokens
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = gguf.GGUFWriter(path, architecture(model.config).name)
        try:
            for key, value in metadata.items():
                add_value(writer, key, value)
            for tensor in tensors:
                declare(writer, tensor.name, Kind.F32, _shape(model, tensor))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        except OSError as error:
            raise LowbitError(f"cannot write to {folder}: {error.strerror}; free some space there") from error
        finally:
            writer.close()
        return padded(path.stat().st_size)
