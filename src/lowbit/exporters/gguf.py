"""A run as one ``.gguf`` file for llama.cpp and the tools built on it: the run's own codes, not quantized again.

The usual route (dequantize, convert, quantize) quantizes a second time, in another format. Here codes are repacked
into blocks, see ``gguf_blocks``. What an architecture's loader needs is in ``gguf_architectures``, where each
parameter goes in ``gguf_tensors``, metadata in ``gguf_model`` and ``gguf_tokenizer``.

Float matrices keep every bit: F16 if that is lossless, else BF16 if that is, else F32. Weights in formats without a
type of llama.cpp's are such matrices too, see ``gguf_floats``. Routers, kernels of convolutions and everything of one
dimension are F32, as llama.cpp's operations take them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lowbit.checkpoints.gguf_types import AnyKind, bytes_of
from lowbit.checkpoints.partial import final_name
from lowbit.errors import LowbitError
from lowbit.exporters.gguf_blocks import BLOCK
from lowbit.exporters.gguf_contents import metadata_of, tensors_of, text_run, weight_types
from lowbit.exporters.gguf_data import data_of, expect, module_of, scale_name, scales_of, shape_of
from lowbit.exporters.gguf_floats import DTYPES, MATRIX_ORDER, cost, holds
from lowbit.exporters.gguf_limits import limits
from lowbit.exporters.gguf_model import architecture
from lowbit.exporters.gguf_readback import expected_value, other, read
from lowbit.exporters.gguf_tensors import FileTensor
from lowbit.exporters.run import Run
from lowbit.exporters.target import Executed, Exporter, Options
from lowbit.models.build import is_composite
from lowbit.progress import say, track
from lowbit.quant.floating import FloatFormat
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import KQuant
from lowbit.quant.tables import TableFormat

FLOATS = {"auto": None, "f32": Kind.F32, "f16": Kind.F16, "q8_0": Kind.Q8_0}
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


def write(run: Run, path: Path, options: Options) -> list[str]:
    """Write the file with at most one tensor of it in memory."""
    if options.embeddings not in FLOATS:
        raise LowbitError(f"--embeddings {options.embeddings} given; allowed: {', '.join(FLOATS)}")
    whole, run = run, text_run(run)
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
    options=frozenset({"embeddings", "pre"}),
)
