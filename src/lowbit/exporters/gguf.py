"""A run as one ``.gguf`` file for llama.cpp and the tools built on it: the run's own codes, not quantized again.

The usual route (dequantize, convert, quantize) quantizes a second time, in another format. Here codes are repacked
into blocks, see ``gguf_blocks``. What an architecture's loader needs is in ``gguf_architectures``, where each
parameter goes in ``gguf_tensors``, metadata in ``gguf_model`` and ``gguf_tokenizer``.

Float matrices keep every bit: F16 if that is lossless, else BF16 if that is, else F32. Weights in formats without a
type of llama.cpp's are such matrices too, see ``gguf_floats``. Routers, kernels of convolutions and everything of one
dimension are F32, as llama.cpp's operations take them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lowbit.checkpoints.gguf_types import AnyKind, OwnKind, Reader, bytes_of, values_of
from lowbit.checkpoints.partial import final_name
from lowbit.errors import LowbitError
from lowbit.exporters.fit import Misfit, no_activations, weight_misfit
from lowbit.exporters.gguf_architectures.text_models import text_model
from lowbit.exporters.gguf_blocks import BLOCK, block_type
from lowbit.exporters.gguf_data import (
    data_of,
    divisors,
    expect,
    module_of,
    scale_name,
    scales_of,
    shape_of,
)
from lowbit.exporters.gguf_floats import DTYPES, MATRIX_ORDER, cost, exact_type, holds
from lowbit.exporters.gguf_model import architecture, model_metadata, unlike_llamacpp
from lowbit.exporters.gguf_native import native_type
from lowbit.exporters.gguf_tensors import (
    FileTensor,
    Share,
    column_order,
    file_tensors,
    row_order,
    stack_of,
    straddles,
)
from lowbit.exporters.gguf_tokenizer import tokenizer_metadata
from lowbit.exporters.run import Run, Subject
from lowbit.exporters.target import Executed, Exporter, Options
from lowbit.models.build import is_composite
from lowbit.models.families import architecture_of
from lowbit.progress import say, track
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import KQuant
from lowbit.quant.tables import TableFormat

FLOATS = {"auto": None, "f32": Kind.F32, "f16": Kind.F16, "q8_0": Kind.Q8_0}
FILE_TYPES = {  # llama.h, LLAMA_FTYPE_MOSTLY_*; for a K type the one without larger types for some tensors
    Kind.F32: 0, Kind.F16: 1, Kind.BF16: 32,
    Kind.Q4_0: 2, Kind.Q8_0: 7, Kind.Q5_0: 8, Kind.Q2_K: 10, Kind.Q3_K: 11, Kind.Q4_K: 14,
    Kind.Q5_K: 16, Kind.Q6_K: 18, Kind.IQ4_NL: 25, Kind.MXFP4: 38, Kind.NVFP4: 39,
    OwnKind.Q2_0: 41,
}  # fmt: skip
# The simulation quantizes inputs as llama.cpp does; what remains are single inputs that fall on the other side of a
# boundary between two codes: below 5% of the logits' spread in SmolLM2's thirty blocks.
EXPLAINED = 0.1
# Matrices that llama.cpp's operations take in F32 alone, or whose inputs it must not round: kernels, routers.
IN_F32 = (
    ".bias",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "conv.weight",
    "conv1d.weight",
    "norm.weight",
    ".ssm_a",
    ".ssm_d",
)


def limits(subject: Subject) -> Misfit | None:
    """llama.cpp's own formats, integers whose signed codes fit a block type, FP8 as floats; activations in float."""
    subject = _of_text(subject)
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


def _of_text(subject: Subject) -> Subject:
    """The same with the config of the text model, where a model has other parts; names stay the model's."""
    return replace(subject, config=text_model(subject.config))


def _text_run(run: Run) -> Run:
    return replace(run, subject=_of_text(run.subject))


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


def weight_types(run: Run) -> dict[str, Any]:
    """The types of all quantized modules; reads those that are stored as floats."""
    out, stacks = {}, dict[str, list[str]]()
    for module, format in run.subject.weights.items():
        kind = type_of(format, run.subject.shapes[module][1])
        out[module] = exact_type(run.qtensor(module).dequantize()) if kind is None else kind
        if kind is None and (place := stack_of(f"{module}.weight")) is not None:
            stacks.setdefault(place[0], []).append(module)
    for modules in stacks.values():
        if len({out[module] for module in modules}) > 1:  # one type for all: the one that holds everything
            out |= dict.fromkeys(modules, Kind.F32)
    return out


def write(run: Run, path: Path, options: Options) -> list[str]:
    """Write the file with at most one tensor of it in memory."""
    if options.embeddings not in FLOATS:
        raise LowbitError(f"--embeddings {options.embeddings} given; allowed: {', '.join(FLOATS)}")
    whole, run = run, _text_run(run)
    types = weight_types(run)
    metadata, warnings = metadata_of(run, options.pre, types)
    if is_composite(whole.subject.config):
        name = whole.subject.config.architectures[0]
        warnings.append(f"the file has the text model of a {name} alone: its other parts stay behind")
    arch = architecture(run.subject.config)
    warnings += arch.warnings(run.subject.config)
    if (line := cost(run, types)) is not None:
        say(line)
    writer = gguf.GGUFWriter(path, arch.name)
    try:
        for key, value in metadata.items():
            add_value(writer, key, value)
        kinds = [(tensor, _kind(run, tensor, options, types, warnings)) for tensor in tensors_of(run)]
        for tensor, kind in kinds:
            declare(writer, tensor.name, kind, shape_of(run, tensor))
            if kind == Kind.NVFP4:
                declare(writer, scale_name(tensor), Kind.F32, (len(tensor.parts),))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in track(kinds, f"writing {final_name(path)}"):
            writer.write_tensor_data(data_of(run, tensor, kind))
            if kind == Kind.NVFP4:
                writer.write_tensor_data(scales_of(run, tensor))
    finally:
        writer.close()
    return warnings


def metadata_of(run: Run, pre: str | None, types: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """All keys and values but ``general.architecture``, and warnings; ``types`` are those of ``weight_types``."""
    config = run.subject.config
    kinds = Counter(types.values())
    name = Path(run.manifest.identity.model).name
    tokens, warnings = tokenizer_metadata(run.folder, config.vocab_size, pre)
    commonest = kinds.most_common(1)[0][0] if kinds else Kind.F32
    return model_metadata(config, name) | {"general.file_type": FILE_TYPES[commonest]} | tokens, warnings


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add a key to a writer's metadata."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tensors_of(run: Run) -> list[FileTensor]:
    """The file's tensors but for the scales beside NVFP4 weights."""
    alone = [module for module in run.quantized if module != shared_head(run)]
    names = [*run.floats, *(f"{module}.weight" for module in alone)]
    return [*(FileTensor(name, (name,)) for name in divisors(run)), *file_tensors(run.subject.config, names)]


def shared_head(run: Run) -> str | None:
    """The head where it has the embedding's codes, scales and all: llama.cpp multiplies with the embedding instead.

    A run has two tensors of a tied one that it quantizes; a file has one.
    """
    model = architecture_of(run.subject.config)
    embed, head = model.embed, model.head
    if architecture(run.subject.config).head == "own" or head not in run.subject.weights:
        return None
    if run.subject.weights[head] != run.subject.weights.get(embed):
        return None
    one, other = run.qtensor(embed), run.qtensor(head)
    equal = torch.equal(one.codes, other.codes) and all(map(torch.equal, one.qparams, other.qparams))
    return head if equal else None


def _kind(run: Run, tensor: FileTensor, options: Options, types: Mapping[str, Any], warnings: list[str]) -> Any:
    """The type in which a tensor is written."""
    name = tensor.parts[0]
    if (module := module_of(run, name)) is not None:
        return types[module]
    if tensor.name.endswith(IN_F32) or expect(run, name).ndim == 1:
        return Kind.F32
    values = [expect(run, part) for part in tensor.parts]
    kind = FLOATS[options.embeddings] or next(
        kind for kind in MATRIX_ORDER if all(holds(value, DTYPES[kind]) for value in values)
    )
    if kind == Kind.Q8_0 and values[0].shape[1] % BLOCK:
        raise LowbitError(
            f"{name} has rows of {values[0].shape[1]}, not a multiple of {BLOCK}: use --embeddings auto"
        )
    if kind not in (Kind.F32, Kind.BF16) and (kind == Kind.Q8_0 or not all(holds(v, torch.float16) for v in values)):
        warnings.append(f"{name} is rounded to {kind.name}: the file is not what was evaluated")
    return kind


def declare(writer: Any, name: str, kind: AnyKind, shape: tuple[int, ...]) -> None:
    """Declare a tensor; data follow once all tensors are declared."""
    if kind in (Kind.F32, Kind.F16):
        dtype = np.dtype(np.float32 if kind == Kind.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        return
    # Told as int8, the shape is taken as it is; of uint8 the package counts bytes, by its own list of types.
    writer.add_tensor_info(name, shape, np.dtype(np.int8), bytes_of(shape, kind), raw_dtype=kind)


def read(run: Run, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file through the package's reader, as the model's parameters in the model's order."""
    run = _text_run(run)
    known = {tensor.name: tensor for tensor in tensors_of(run)}
    stored = Reader(path).tensors
    scales = {t.name: t.data for t in stored if t.name.endswith(".scale") and t.name not in known}
    shares: dict[str, dict[int, Any]] = {}
    head = shared_head(run)
    for tensor in stored:
        if tensor.name in scales:  # part of the weight beside it
            continue
        value = values_of(tensor.data, tensor.tensor_type)
        own = known.get(tensor.name, FileTensor(tensor.name, (tensor.name,)))
        factors = scales.get(scale_name(own))
        if own.share is not None:
            value = _joined(value, own, own.share, shares)
            if value is None:
                continue
        for index, name in enumerate(own.parts):
            # Of a stack with fewer parts than the model has, those that are missing are not yielded.
            if own.stacked and index >= len(value):
                break
            part = value[index] if own.stacked else value
            part = part if factors is None else part * factors[index if own.stacked else 0]
            found = _in_order(run, name, torch.from_numpy(np.ascontiguousarray(part)))
            yield name, found
            if head is not None and name == f"{architecture_of(run.subject.config).embed}.weight":
                yield f"{head}.weight", found


def _joined(value: Any, tensor: FileTensor, share: Share, shares: dict[str, dict[int, Any]]) -> Any:
    """A parameter of whose shares this is the last one; ``None`` for the ones before, which ``shares`` keeps."""
    held = shares.setdefault(tensor.parts[0], {})
    held[share.start] = value
    complete = sum(map(len, held.values())) == share.total
    return np.concatenate([held[start] for start in sorted(held)]) if complete else None


def _in_order(run: Run, name: str, value: Tensor) -> Tensor:
    """Rows and columns back in the model's order; left alone where their number is another, which shows by itself."""
    rows, columns = row_order(run.subject.config, name), column_order(run.subject.config, name)
    if rows is not None and len(rows) == len(value):
        value = value[rows.argsort()]
    if columns is not None and value.ndim == 2 and len(columns) == value.shape[1]:
        value = value[:, columns.argsort()]
    return value.contiguous()


def other(run: Run, path: Path) -> Iterator[str]:
    """Metadata keys whose values differ from the run's."""
    run = _text_run(run)
    fields = Reader(path).fields
    stored = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    types = weight_types(run)
    try:
        expected, _ = metadata_of(run, None, types)
    except LowbitError:
        expected, _ = metadata_of(run, str(stored.get("tokenizer.ggml.pre")), types)
    expected["general.architecture"] = architecture(run.subject.config).name
    for key in sorted({**expected, **stored}):
        ours, theirs = expected.get(key), stored.get(key)
        if isinstance(ours, float):
            ours = float(np.float32(ours))
        if ours != theirs and not (ours == [] and theirs is None):
            yield key


def execute(path: Path, ids: Tensor) -> Executed | None:
    """llama.cpp's logits, where ``llama-cpp-python`` is installed."""
    if find_spec("llama_cpp") is None:
        return None
    from lowbit.exporters.llamacpp import open_session

    with open_session(path, len(ids), exact=True) as session:
        return Executed(session.logits(ids.tolist()), EXPLAINED, "llama.cpp")


def owns(path: Path) -> bool:
    """A file named ``.gguf``; its content is checked by the reader."""
    return path.is_file() and path.suffix == ".gguf"


def expected_value(run: Run, name: str) -> Tensor:
    """The value that a file must hold for a parameter, in the order of the model's rows and columns."""
    return expect(_text_run(run), name)


EXPORTER = Exporter(
    ".gguf",
    limits,
    write,
    owns,
    read,
    other,
    expected_value,
    execute,
    formats=(IntFormat, KQuant, TableFormat, FloatFormat),
    experts=True,
    text_models=True,
)
