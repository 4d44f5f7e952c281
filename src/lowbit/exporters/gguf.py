"""A run as one ``.gguf`` file for llama.cpp and the tools built on it: the run's own codes, not quantized again.

The usual route (dequantize, convert, quantize) quantizes a second time, in another format. Here codes are repacked
into blocks, see ``gguf_blocks``; names come from the ``gguf`` package's own map, metadata from ``gguf_model`` and
``gguf_tokenizer``. Two things are stored differently and compute the same:

* Under the ``llama`` architecture rotary pairs are adjacent, so the rows of q and k (codes, scales, biases) are
  interleaved within each head: ``(heads, 2, d / 2) -> (heads, d / 2, 2)``.
* Gemma's norms multiply by ``1 + weight``, and that sum is stored; the library computes the same sum in float32.

Float matrices keep every bit: F16 if that is lossless, else BF16 if that is, else F32. Weights in formats without a
type of llama.cpp's are such matrices too, see ``gguf_floats``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lowbit.checkpoints.gguf_rope import TABLES
from lowbit.checkpoints.gguf_types import AnyKind, OwnKind, Reader, bytes_of, values_of
from lowbit.checkpoints.partial import final_name
from lowbit.errors import LowbitError
from lowbit.exporters.fit import Misfit, no_activations, weight_misfit
from lowbit.exporters.gguf_blocks import BLOCK, block_type, pack_blocks
from lowbit.exporters.gguf_floats import DTYPES, MATRIX_ORDER, cost, exact_type, holds
from lowbit.exporters.gguf_model import WINDOWS, architecture, head_dim, model_metadata, unlike_llamacpp
from lowbit.exporters.gguf_native import native_type, pack_native
from lowbit.exporters.gguf_rope import rope_tensors
from lowbit.exporters.gguf_tokenizer import tokenizer_metadata
from lowbit.exporters.run import Run, Subject
from lowbit.exporters.target import Executed, Exporter, Options, value_of
from lowbit.progress import say, track
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import KQuant
from lowbit.quant.scales import TwoLevel, shared_exponent
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


def limits(subject: Subject) -> Misfit | None:
    """llama.cpp's own formats, integers whose signed codes fit a block type, FP8 as floats; activations in float."""
    if (why := unlike_llamacpp(subject.config)) is not None:
        return Misfit("architecture", why)
    misfit = no_activations(subject, "llama.cpp quantizes them to its own 8-bit blocks")
    if misfit is not None:
        return misfit
    for module, format in subject.weights.items():
        kind = type_of(format, subject.shapes[module][1])
        if isinstance(kind, str):
            return weight_misfit(subject, module, kind)
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
    out = {}
    for module, format in run.subject.weights.items():
        kind = type_of(format, run.subject.shapes[module][1])
        out[module] = exact_type(run.qtensor(module).dequantize()) if kind is None else kind
    return out


def write(run: Run, path: Path, options: Options) -> list[str]:
    """Write the file with at most one tensor in memory."""
    if options.embeddings not in FLOATS:
        raise LowbitError(f"--embeddings {options.embeddings} given; allowed: {', '.join(FLOATS)}")
    types = weight_types(run)
    metadata, warnings = metadata_of(run, options.pre, types)
    if (line := cost(run, types)) is not None:
        say(line)
    writer = gguf.GGUFWriter(path, architecture(run.subject.config) or "")
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        kinds = _kinds(run, options, types, warnings)
        for name, (kind, shape) in kinds.items():
            _declare(writer, gguf_name(run, name), kind, shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (kind, _) in track(list(kinds.items()), f"writing {final_name(path)}"):
            writer.write_tensor_data(_data(run, name, kind))
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


def _add(writer: Any, key: str, value: Any) -> None:
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


def gguf_name(run: Run, name: str) -> str:
    """A parameter's name in the file."""
    if name in TABLES:
        return name
    arch = gguf.MODEL_ARCH_NAMES
    kind = next(key for key, value in arch.items() if value == architecture(run.subject.config))
    names = gguf.get_tensor_name_map(kind, run.subject.config.num_hidden_layers)
    stored_name = names.get_name(name, try_suffixes=(".weight", ".bias", ".scale"))
    if stored_name is None:
        raise LowbitError(f"the installed gguf package has no name for '{name}' of {run.folder}: update gguf")
    return str(stored_name)


def names_of(run: Run) -> list[str]:
    """The model's names of all parameters, and the file's of divisors of rotary frequencies, if there are any."""
    return [*_rope(run), *run.floats, *(f"{module}.weight" for module in run.quantized)]


def expect(run: Run, name: str) -> Tensor:
    """The value that the file must hold for a parameter, up to the order of rows."""
    if (divisors := _rope(run).get(name)) is not None:
        return divisors
    value = value_of(run, name)
    return value + 1.0 if _is_gain(run, name) else value


def _rope(run: Run) -> dict[str, Tensor]:
    return rope_tensors(run.subject.config, head_dim(run.subject.config))


def _is_gain(run: Run, name: str) -> bool:
    return architecture(run.subject.config) in WINDOWS and name.endswith("norm.weight")


def _kinds(
    run: Run, options: Options, types: Mapping[str, Any], warnings: list[str]
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Type and shape by the model's names."""
    out: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for name in names_of(run):
        module = name.removesuffix(".weight")
        if module in run.subject.weights:
            shape = run.subject.shapes[module]
            out[name] = types[module], shape
            if types[module] == Kind.NVFP4:
                out[f"{module}.scale"] = Kind.F32, (1,)
            continue
        value = expect(run, name)
        kind = Kind.F32 if value.ndim == 1 else (FLOATS[options.embeddings] or exact_type(value, MATRIX_ORDER))
        if kind == Kind.Q8_0 and value.shape[1] % BLOCK:
            raise LowbitError(
                f"{name} has rows of {value.shape[1]}, not a multiple of {BLOCK}: use --embeddings auto"
            )
        if kind not in (Kind.F32, Kind.BF16) and (kind == Kind.Q8_0 or not holds(value, torch.float16)):
            warnings.append(f"{name} is rounded to {kind.name}: the file is not what was evaluated")
        out[name] = kind, tuple(value.shape)
    return out


def _declare(writer: Any, name: str, kind: AnyKind, shape: tuple[int, ...]) -> None:
    """Declare a tensor; data follow once all tensors are declared."""
    if kind in (Kind.F32, Kind.F16):
        dtype = np.dtype(np.float32 if kind == Kind.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        return
    # Told as int8, the shape is taken as it is; of uint8 the package counts bytes, by its own list of types.
    writer.add_tensor_info(name, shape, np.dtype(np.int8), bytes_of(shape, kind), raw_dtype=kind)


def _data(run: Run, name: str, kind: Any) -> Any:
    module = name.removesuffix(".weight")
    order = _rows(run, name)
    if module in run.subject.weights:
        q = run.qtensor(module)
        if order is not None:
            q = q.select_rows(order)
        if kind in DTYPES:
            return gguf.quants.quantize(q.dequantize().contiguous().numpy(), kind)
        if isinstance(q.format, IntFormat):
            return pack_blocks(q, kind)
        return pack_native(q, _divisor(run, module) or 0)
    if name.endswith(".scale"):
        exponent = _divisor(run, name.removesuffix(".scale"))
        assert exponent is not None
        return np.array([2.0**-exponent], dtype=np.float32)
    value = expect(run, name)
    value = value if order is None else value[order]
    return gguf.quants.quantize(value.contiguous().numpy(), kind)


def _divisor(run: Run, module: str) -> int | None:
    """The exponent of the power of two that divides a tensor's scales, which the file holds beside the blocks."""
    if not isinstance(run.subject.weights[module].scales, TwoLevel):
        return None
    return shared_exponent([run.qtensor(module).qparams.scale])


def _heads(run: Run, name: str) -> int:
    """Number of heads whose rows the file interleaves, or 0."""
    config = run.subject.config
    if architecture(config) != "llama":
        return 0
    part = name.rpartition("self_attn.")[2].partition(".")[0]
    return int({"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part, 0))


def _rows(run: Run, name: str) -> Tensor | None:
    """The order in which a parameter's rows are written; ``None`` if unchanged."""
    if not (heads := _heads(run, name)):
        return None
    dim = head_dim(run.subject.config)
    return torch.arange(heads * dim).reshape(heads, 2, dim // 2).transpose(1, 2).flatten()


def read(run: Run, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file through the package's reader, with the rows of q and k in the model's order."""
    names = {gguf_name(run, name): name for name in names_of(run)}
    tensors = Reader(path).tensors
    scales = {tensor.name: tensor.data for tensor in tensors if tensor.name.endswith(".scale")}
    for tensor in tensors:
        name = names.get(tensor.name, tensor.name)
        scale = scales.get(f"{tensor.name.removesuffix('.weight')}.scale")
        if tensor.name in scales:  # part of the weight beside it
            continue
        value = values_of(tensor.data, tensor.tensor_type)
        if scale is not None:
            value *= scale[0]
        if heads := _heads(run, name):
            split = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
            value = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(value.shape)
        yield name, torch.from_numpy(value)


def other(run: Run, path: Path) -> Iterator[str]:
    """Metadata keys whose values differ from the run's."""
    fields = Reader(path).fields
    stored = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    types = weight_types(run)
    try:
        expected, _ = metadata_of(run, None, types)
    except LowbitError:
        expected, _ = metadata_of(run, str(stored.get("tokenizer.ggml.pre")), types)
    expected["general.architecture"] = architecture(run.subject.config)
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


EXPORTER = Exporter(
    ".gguf",
    limits,
    write,
    owns,
    read,
    other,
    expect,
    execute,
    formats=(IntFormat, KQuant, TableFormat, FloatFormat),
)
