"""Atomic writes: a file is created under a temporary name, flushed to disk and renamed.

A file with a final name is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lowbit.checkpoints.partial import commit, partial_of
from lowbit.checkpoints.shards import INDEX
from lowbit.errors import LowbitError


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; raises ``LowbitError`` for a full disk or an unwritable folder."""
    partial = partial_of(path)
    try:
        partial.write_bytes(content)
        commit(partial, path)
    except OSError as error:
        _fail(partial, path, error)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys, so that equal content gives equal bytes.

    Halves of characters, which names of files and other JSON may hold, have no UTF-8: they are written as JSON's
    escapes, and read back as they were.
    """
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically.

    The only metadata is ``format: pt``, which loaders require; with two entries their order, and so the bytes, would
    differ from run to run.
    """
    partial = partial_of(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata={"format": "pt"})
        partial.chmod(mode)  # the library makes its files readable by their owner only
        commit(partial, path)
    except (OSError, SafetensorError) as error:
        _fail(partial, path, error)


def _fail(partial: Path, path: Path, error: Exception) -> None:
    with suppress(OSError):
        partial.unlink(missing_ok=True)
    raise LowbitError(f"cannot write {path}: {error}; free some space or choose another --out") from error


def write_index(folder: Path, shards: Mapping[str, Iterable[str]]) -> None:
    """Write the index of ``{file: tensor names}``, which makes the shards a checkpoint."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum((folder / file).stat().st_size for file in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
