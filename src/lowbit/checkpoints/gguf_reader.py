"""A ``.gguf`` file as a Hugging Face folder: config, tokenizer and float32 safetensors shards.

The rest of ``lowbit`` reads one kind of checkpoint, so a GGUF file is converted once rather than read in place.
Tensors are dequantized one at a time from the file's memory map and written as soon as a shard is full: the memory
needed is about one shard plus the largest tensor, whatever the size of the model. The values are those that the
``gguf`` package computes, in float32; 16 bits would round them a second time.

The config comes from ``gguf_config``, which refuses by name whatever changes the function and cannot be expressed.
Names and row orders come from transformers: its name map (built from a model without storage) and its tensor
processors; ``gguf_check`` compares their results with the file's values. Rejected: ``from_pretrained(gguf_file=...)``
followed by saving, which needs the whole model in memory and drops most metadata; split files, for which llama.cpp
has a merge tool.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

from lowbit.checkpoints.gguf_check import check_values
from lowbit.checkpoints.gguf_config import ARCHITECTURES, Content, architecture_of, config_of
from lowbit.checkpoints.gguf_rope import TABLES
from lowbit.checkpoints.partial import STALE_SECONDS, flush
from lowbit.checkpoints.safetensors_folder import SINGLE, write_index, write_tensors
from lowbit.errors import LowbitError, one_line
from lowbit.progress import say, track

SHARD_BYTES = 2 << 30
# Rotary frequencies that early converters copied from checkpoints; llama.cpp computes its own.
UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
# Exceptions of the readers on broken bytes: they validate little and fail at the first impossible number.
BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, MemoryError, struct.error)


class ShardWriter:
    """Writes tensors, given one by one, as safetensors shards of at most ``limit`` bytes (or one tensor)."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder, self.limit = folder, limit
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, value: Tensor) -> None:
        """Add a tensor, whose storage must not change afterwards; writes a shard first if it would overflow."""
        if self._pending and self._bytes + value.nbytes > self.limit:
            self._flush()
        self._pending[name] = value
        self._bytes += value.nbytes

    def close(self) -> None:
        """Write pending tensors; one shard becomes ``model.safetensors``, several are numbered and get an index."""
        self._flush()
        total = len(self._shards)
        if total == 1:
            os.replace(self.folder / _draft(0), self.folder / SINGLE)
            return
        names = {f"model-{i + 1:05d}-of-{total:05d}.safetensors": shard for i, shard in enumerate(self._shards)}
        for i, file in enumerate(names):
            os.replace(self.folder / _draft(i), self.folder / file)
        write_index(self.folder, names)

    def _flush(self) -> None:
        write_tensors(self.folder / _draft(len(self._shards)), self._pending)
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0


def _draft(index: int) -> str:
    """A shard's name until the number of shards is known."""
    return f"draft-{index:05d}.safetensors"


def build(final: Path, write: Callable[[Path], None]) -> Path:
    """The folder ``final``, created by ``write`` under a temporary name and renamed, unless it exists already.

    Raises ``LowbitError`` where the cache cannot be written.
    """
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final.parent)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix="partial-") as temporary:
            work = Path(temporary) / "folder"
            work.mkdir()
            write(work)
            for file in work.iterdir():
                flush(file)
            try:
                os.rename(work, final)
            except OSError:
                # Another process has converted the same content first; its folder is equivalent.
                if not final.is_dir():
                    raise
    except OSError as error:
        raise LowbitError(f"cannot create {final}: {error}; free some space or set LOWBIT_CACHE") from error
    return final


def _sweep(parent: Path) -> None:
    """Remove leftovers of killed conversions; a running one adds a shard far more often than once a day."""
    for work in parent.glob("partial-*/folder"):
        if time.time() - work.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(work.parent, ignore_errors=True)


def convert(path: Path, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model in the GGUF file ``path`` into the empty folder ``target``; ``config.json`` comes last.

    Every floating-point tensor is float32, with transformers' name and layout. Raises ``LowbitError`` for an
    incomplete file, an architecture, metadata or tensors that transformers cannot compute with, an unsupported tensor
    type, and tensors that do not match the metadata. A file without a usable tokenizer yields a folder without one,
    and a warning.
    """
    path = path.resolve()
    reader = _open(path)
    content = _content(reader, path)
    architecture = architecture_of(content)
    config = _config(content)
    model = _meta_model(config, path)
    shards = ShardWriter(target, shard_bytes)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing = set(shapes) - set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, value in _tensors(reader, architecture, model, path):
        if name in shapes and tuple(value.shape) != shapes[name]:
            raise LowbitError(
                f"'{name}' in {path} is {tuple(value.shape)}, its metadata implies {shapes[name]}: fetch it again"
            )
        missing.discard(name)
        shards.add(name, value)
    if missing:
        raise LowbitError(
            f"{path} lacks {len(missing)} of the tensors that its metadata implies, such as '{min(missing)}': "
            "fetch it again"
        )
    shards.close()
    _write_tokenizer(path, target)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    GenerationConfig.from_model_config(config).save_pretrained(target)
    config.save_pretrained(target)


def check_magic(path: Path) -> None:
    """Raise ``LowbitError`` if the file cannot be read or does not begin with GGUF's magic number."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise LowbitError(f"cannot read {path}: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise LowbitError(f"{path} is not a GGUF file: it begins with {magic!r}, not with b'GGUF'")


def _open(path: Path) -> Any:
    """A reader of the file, after checks that it does not make itself."""
    check_magic(path)
    try:
        reader = GGUFReader(path)
    except BROKEN as error:
        raise LowbitError(f"{path} is not a complete GGUF file ({one_line(error)}): fetch it again") from error
    if reader.byte_order != "I":
        # Quantized blocks would be read in the wrong byte order without an error.
        raise LowbitError(f"{path} has the other byte order: convert it with gguf-convert-endian")
    return reader


def _content(reader: Any, path: Path) -> Content:
    """The file without tensors, but for the divisors of rotary frequencies; of token lists only the length."""
    lists = [key for key in reader.fields if key.startswith("tokenizer.") and len(reader.fields[key].data) > 1]
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    try:
        values = {key: field.contents() for key, field in reader.fields.items() if key not in lists}
        tables = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors if t.name in TABLES}
    except (*BROKEN, NotImplementedError) as error:
        raise LowbitError(f"{path} has unreadable metadata ({one_line(error)}): fetch it again") from error
    parts = values.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise LowbitError(f"{path} is one of {parts} parts: merge them first with llama-gguf-split --merge")
    return Content(
        path,
        values,
        {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors},
        {name: [float(v) for v in np.ravel(table)] for name, table in tables.items()},
        len(tokens.data) if tokens is not None else None,
    )


def _config(content: Content) -> Any:
    try:
        return config_of(content)
    except LowbitError:
        raise
    except Exception as error:  # configs validate with exceptions of many types
        raise LowbitError(f"the metadata of {content.path} is not a valid model config: {one_line(error)}") from error


def _meta_model(config: Any, path: Path) -> Any:
    """The model without storage: its class, its parameters' names and shapes."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # impossible sizes fail anywhere in the model's code
        raise LowbitError(f"the metadata of {path} does not define a model: {one_line(error)}") from error


def _tensors(reader: Any, architecture: str, model: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Transformers' names and float32 values, one tensor of the file at a time, each checked.

    Raises ``LowbitError``, before the first one, for tensors that the model has no place for.
    """
    config = model.config
    processor = ARCHITECTURES[architecture].processor(config=config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise LowbitError(f"the installed gguf package does not know the tensors of {path}: {error}") from error
    used = [tensor for tensor in reader.tensors if tensor.name not in TABLES and not UNUSED.fullmatch(tensor.name)]
    if unknown := sorted(tensor.name for tensor in used if tensor.name not in names):
        raise LowbitError(
            f"{path} has the tensor {unknown[0]} ({len(unknown)} such in all), which transformers' "
            f"{type(model).__name__} has no place for: use the model's own folder"
        )
    for tensor in track(used, f"converting {path.name}"):
        source, value = _processed(processor, tensor, path)
        check_values(path, architecture, tensor.name, source, value, config)
        # Tensors stored as floats are views of the read-only memory map, hence the copy.
        yield names[tensor.name], torch.from_numpy(np.require(value, requirements=["C", "W", "O"]))


def _processed(processor: Any, tensor: Any, path: Path) -> tuple[Any, Any]:
    """A tensor's values in the file, and in transformers' layout."""
    try:
        weights = dequantize(tensor.data, tensor.tensor_type)
        return weights, processor.process(weights=weights, name=tensor.name).weights
    except NotImplementedError as error:
        raise LowbitError(
            f"'{tensor.name}' in {path} has the type {tensor.tensor_type.name}, which the gguf package "
            "cannot dequantize: use a file with another quantization"
        ) from error
    except BROKEN as error:
        raise LowbitError(f"'{tensor.name}' in {path} does not fit its metadata ({one_line(error)})") from error


def _write_tokenizer(path: Path, target: Path) -> None:
    """Save the file's tokenizer, chat template included."""
    try:
        # An absolute file name takes precedence over the folder, so that no tokenizer next to the file is used.
        tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=str(path), local_files_only=True)
        # The tokenizer stores its arguments and would write this one into tokenizer_config.json.
        tokenizer.init_kwargs.pop("local_files_only", None)
        tokenizer.save_pretrained(target)
    except Exception as error:  # the tokenizers library raises nothing narrower
        say(f"{path.name}: no tokenizer that transformers can use ({one_line(error)}); the converted folder has none")
