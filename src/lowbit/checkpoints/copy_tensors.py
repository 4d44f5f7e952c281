"""Copies tensors from one safetensors file to another by their bytes, whatever they hold.

A safetensors file is a length in 8 bytes, a header in JSON, and the tensors' bytes; the header has each tensor's
dtype, shape and place. Nothing is decoded: a dtype that torch lacks, NaN and anything else come out as they went in.
A few megabytes are in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lowbit.checkpoints.partial import commit, partial_of
from lowbit.errors import LowbitError

CHUNK = 8 << 20  # bytes
# By bytes of a value: the widest come first, as the library writes them, so that each begins at a multiple of them.
_WIDTHS = {8: ("F64", "I64", "U64", "C64"), 4: ("F32", "I32", "U32"), 2: ("F16", "BF16", "I16", "U16")}
_WIDE = {dtype: width for width, dtypes in _WIDTHS.items() for dtype in dtypes}


def copy_tensors(folder: Path, files: Mapping[str, str], target: Path) -> int:
    """Write a file with copies of tensors, atomically; returns their bytes.

    Args:
        folder: where the tensors are.
        files: the file of each tensor by its name in it; the copy keeps the name.
        target: the file to write.

    Raises:
        LowbitError: a file cannot be read or written, or ends before its tensors do.
    """
    copied = _plan(folder, files)
    partial = partial_of(target)
    try:
        with partial.open("wb") as out:
            out.write(copied.head)
            for path, begin, count in copied.places:
                _copy(path, begin, count, out)
        commit(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LowbitError(f"cannot write {target}: {error}; free some space or choose another --out") from error
    return copied.end


def copied_size(folder: Path, files: Mapping[str, str]) -> int:
    """Bytes of the file that ``copy_tensors`` writes with the same arguments; 0 where it has nothing to write.

    Raises:
        LowbitError: a file cannot be read.
    """
    if not files:
        return 0
    copied = _plan(folder, files)
    return len(copied.head) + copied.end


@dataclass(frozen=True)
class _Copy:
    """A file to write: its beginning, then of each tensor the file, the place and the bytes; ``end`` is their sum."""

    head: bytes
    places: list[tuple[Path, int, int]]
    end: int


def _plan(folder: Path, files: Mapping[str, str]) -> _Copy:
    headers = {file: _header(folder / file) for file in {*files.values()}}
    entries = {name: headers[file][1][name] for name, file in files.items()}
    names = sorted(entries, key=lambda name: (-_WIDE.get(entries[name]["dtype"], 1), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, places = 0, list[tuple[Path, int, int]]()
    for name in names:
        first, last = entries[name]["data_offsets"]
        begin, end = end, end + last - first
        header[name] = {**entries[name], "data_offsets": [begin, end]}
        places.append((folder / files[name], headers[files[name]][0] + first, last - first))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _Copy(len(text).to_bytes(8, "little") + text, places, end)


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the bytes of a file's tensors begin, and its header, which the library has read once and found sound."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return 8 + size, json.loads(file.read(size))
    except (OSError, ValueError) as error:
        raise LowbitError(f"cannot read {path}: {error}") from error


def _copy(path: Path, start: int, size: int, out: BinaryIO) -> None:
    with path.open("rb") as file:
        file.seek(start)
        while size:
            chunk = file.read(min(CHUNK, size))
            if not chunk:
                raise LowbitError(f"{path} ends before its tensors do: fetch it again")
            out.write(chunk)
            size -= len(chunk)
