"""A ``.gguf`` file as a Hugging Face folder: config, tokenizer and float32 safetensors shards.

The rest of ``lowbit`` reads one kind of checkpoint, so a GGUF file is converted once rather than read in place.
Tensors are dequantized one at a time from the file's memory map and written as soon as a shard is full: the memory
needed is about one shard plus the largest tensor, whatever the size of the model. The values are those that the
``gguf`` package computes, in float32; 16 bits would round them a second time.

Names and row orders come from transformers: its name map (built from a model without storage) and its tensor
processors are used, so an architecture is supported exactly if transformers maps it. Rejected:
``from_pretrained(gguf_file=...)`` followed by saving, which needs the whole model in memory; tables of our own, which
become outdated; split files, for which llama.cpp has a merge tool.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from lowbit.checkpoints.partial import STALE_SECONDS, flush
from lowbit.checkpoints.safetensors_folder import SINGLE, write_index, write_tensors
from lowbit.errors import LowbitError
from lowbit.progress import say, track

SHARD_BYTES = 2 << 30
# Exceptions of the readers on broken bytes: they validate little and fail at the first impossible number.
BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, MemoryError, struct.error)


def one_line(error: BaseException) -> str:
    """An error's message as one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


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
    incomplete file, an unsupported architecture or tensor type, and tensors that do not match the metadata. A file
    without a usable tokenizer yields a folder without one, and a warning.
    """
    path = path.resolve()
    reader = _open(path)
    architecture = _architecture(reader, path)
    facts, config = _config(path, len(reader.tensors))
    model = _meta_model(config, path)
    shards = ShardWriter(target, shard_bytes)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing = set(shapes) - set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, value in _tensors(reader, architecture, model, facts, path):
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
    parts = _field(reader, "split.count")
    if parts is not None and parts > 1:
        raise LowbitError(f"{path} is one of {parts} parts: merge them first with llama-gguf-split --merge")
    return reader


def _field(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _architecture(reader: Any, path: Path) -> str:
    """``general.architecture``, if transformers maps it."""
    known = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
    name = _field(reader, "general.architecture")
    # The list has transformers' spelling ("qwen2_moe"), files have llama.cpp's ("qwen2moe").
    if not isinstance(name, str) or _plain(name) not in map(_plain, known):
        raise LowbitError(f"{path} has the architecture {name!r}; transformers maps only: {', '.join(known)}")
    return name


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def _config(path: Path, tensors: int) -> tuple[dict[str, Any], Any]:
    """The metadata as transformers parses it (its processors need that) and the config built from it."""
    try:
        facts = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
        if not 0 < facts.get("num_hidden_layers", 1) <= tensors:
            # Building a model of a billion layers, even one without storage, would take all memory.
            raise ValueError(f"{facts['num_hidden_layers']} blocks, but {tensors} tensors")
        # The model's title in the file is not a path to load it from.
        content = {key: value for key, value in facts.items() if key != "_model_name_or_path"}
        return facts, CONFIG_MAPPING[facts["model_type"]].from_dict(content)
    except Exception as error:  # configs validate with exceptions of many types
        raise LowbitError(f"the metadata of {path} is not a valid model config: {one_line(error)}") from error


def _meta_model(config: Any, path: Path) -> Any:
    """The model without storage: its class, its parameters' names and shapes."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise LowbitError(f"{path} holds a '{config.model_type}', which is not a causal language model")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # impossible sizes fail anywhere in the model's code
        raise LowbitError(f"the metadata of {path} does not define a model: {one_line(error)}") from error


def _tensors(
    reader: Any, architecture: str, model: Any, facts: dict[str, Any], path: Path
) -> Iterator[tuple[str, Tensor]]:
    """Transformers' names and float32 values, one tensor of the file at a time.

    A processor may store its result in a dictionary instead of returning it, when several tensors of the file form
    one (the experts of a mixture); such a tensor is yielded once its last part has been read.
    """
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=facts)
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise LowbitError(f"the installed gguf package does not know the tensors of {path}: {error}") from error
    targets = {t.name: names.get(t.name) or names.get(t.name.removesuffix(".weight")) for t in reader.tensors}
    if unused := sorted(name for name, target in targets.items() if target is None):
        say(f"{path.name}: transformers does not use {', '.join(unused[:5])} ({len(unused)} in all): ignored")
    remaining = Counter(targets.values())
    collected: dict[str, Any] = {"tensors": {}}
    for tensor in track(reader.tensors, f"converting {path.name}"):
        target = targets[tensor.name]
        if target is None:
            continue
        result = _processed(processor, tensor, names, collected, path)
        remaining[target] -= 1
        if result.name is not None:
            # Tensors stored as floats are views of the read-only memory map, hence the copy.
            yield target, torch.from_numpy(np.require(result.weights, requirements=["C", "W", "O"]))
        elif remaining[target] == 0 and target in collected["tensors"]:
            yield target, collected["tensors"].pop(target).contiguous()
    yield from collected["tensors"].items()


def _processed(processor: Any, tensor: Any, names: dict[str, str], collected: dict[str, Any], path: Path) -> Any:
    """A tensor's values and name after the processor; see ``_tensors``."""
    try:
        weights = dequantize(tensor.data, tensor.tensor_type)
        return processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters=collected
        )
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
