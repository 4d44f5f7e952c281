"""A ``.gguf`` file as a Hugging Face folder: config, tokenizer and float32 safetensors shards.

The rest of ``lowbit`` reads one kind of checkpoint, so a GGUF file is converted once rather than read in place.
Tensors are dequantized one at a time from the file's memory map and written as soon as a shard is full: the memory
needed is about one shard plus the largest tensor, whatever the size of the model. The values are those that the
``gguf`` package computes, in float32; 16 bits would round them a second time.

Row orders come from transformers' tensor processors; ``gguf_check`` compares their results with the file's values.
Rejected: ``from_pretrained(gguf_file=...)`` followed by saving, which needs the whole model in memory and drops most
metadata; split files, for which llama.cpp has a merge tool.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from lowbit.checkpoints.gguf_check import check_values
from lowbit.checkpoints.gguf_experts import stored_shapes
from lowbit.checkpoints.gguf_file import BROKEN, GgufFile, open_gguf
from lowbit.checkpoints.gguf_sources import ARCHITECTURES
from lowbit.checkpoints.gguf_tokenizer import write_tokenizer
from lowbit.checkpoints.gguf_types import values_of
from lowbit.checkpoints.partial import STALE_SECONDS, flush
from lowbit.checkpoints.shards import SINGLE
from lowbit.checkpoints.writing import write_index, write_tensors
from lowbit.errors import LowbitError, one_line
from lowbit.progress import track

SHARD_BYTES = 2 << 30
LEFT_OVER = "lowbit-partial-"  # start of the names of folders that are being made: a name that nobody else gives
AS_VECTOR = "ffn_gate_inp_shexp.weight"  # a linear of one output


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
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=LEFT_OVER) as temporary:
            work = Path(temporary) / "folder"
            work.mkdir()
            write(work)
            for file in work.rglob("*"):  # companions may lie in subfolders
                if file.is_file():
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
    for work in parent.glob(f"{LEFT_OVER}*/folder"):
        if time.time() - work.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(work.parent, ignore_errors=True)


def convert(path: Path, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model in the GGUF file ``path`` into the empty folder ``target``; ``config.json`` comes last.

    Every floating-point tensor is float32, with transformers' name and layout. Raises ``LowbitError`` for an
    incomplete file, an architecture, metadata or tensors that transformers cannot compute with, an unsupported tensor
    type, and tensors that do not match the metadata. A file without a usable tokenizer yields a folder without one,
    a warning, and ``gguf_tokenizer.NO_TOKENIZER`` with the reason.
    """
    path = path.resolve()
    file = open_gguf(path)
    model, config = file.model, file.model.config
    shards = ShardWriter(target, shard_bytes)
    shapes = stored_shapes(model, ARCHITECTURES[file.architecture].experts)
    missing = set(shapes) - set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, value in _tensors(file):
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
    write_tokenizer(path, target)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    GenerationConfig.from_model_config(config).save_pretrained(target)
    config.save_pretrained(target)


def _tensors(file: GgufFile) -> Iterator[tuple[str, Tensor]]:
    """Transformers' names and float32 values, one tensor of the file at a time, each checked."""
    for tensor in track(file.tensors, f"converting {file.path.name}"):
        source, value = _processed(file, tensor)
        check_values(file.path, file.architecture, tensor.name, source, value, file.model.config)
        # What a processor gives may be a view in another order.
        yield file.names[tensor.name], torch.from_numpy(np.require(value, requirements=["C", "W", "O"]))


def _processed(file: GgufFile, tensor: Any) -> tuple[Any, Any]:
    """A tensor's values in the file, and in transformers' layout."""
    path = file.path
    try:
        weights = values_of(tensor.data, tensor.tensor_type)
        if (scale := file.scales.get(tensor.name)) is not None:
            weights = weights * scale
        value = file.processor.process(weights=weights, name=tensor.name).weights
        return weights, value[None] if tensor.name.endswith(AS_VECTOR) else value
    except NotImplementedError as error:
        raise LowbitError(
            f"'{tensor.name}' in {path} has the type {tensor.tensor_type.name}, which the gguf package "
            "cannot dequantize: use a file with another quantization"
        ) from error
    except BROKEN as error:
        raise LowbitError(f"'{tensor.name}' in {path} does not fit its metadata ({one_line(error)})") from error
