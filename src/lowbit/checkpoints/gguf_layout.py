"""Checks where everything in a ``.gguf`` file lies, before the ``gguf`` package reads it.

That package follows lengths, types and offsets as they are told: an array of 2**40 numbers is a loop without end, and
an offset into another tensor gives numbers without an error. So the file is walked once here, by the rules of
llama.cpp's own reader: lengths end inside the file, keys and names occur once, arrays hold no arrays, and tensors lie
one behind the other in the order of their list, each at the next multiple of the alignment.

``magic, version, number of tensors, number of keys | keys: name, type, value | tensors: name, rank, dimensions, type,
offset | padding | data``; all numbers are little-endian, offsets count from the start of the data.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, https://github.com/ggml-org/ggml/blob/master/src/gguf.cpp
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValueType

from lowbit.checkpoints.gguf_types import SIZES as BLOCK_SIZES
from lowbit.checkpoints.gguf_types import known_type
from lowbit.errors import LowbitError, shown

VERSIONS = (2, 3)
RANK = 4  # dimensions of a tensor at most
COUNT = 4 + 4  # place of the number of tensors
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"
LEAST_KEY, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes of an entry with an empty name
SIZES = {
    **dict.fromkeys((GGUFValueType.UINT8, GGUFValueType.INT8, GGUFValueType.BOOL), 1),
    **dict.fromkeys((GGUFValueType.UINT16, GGUFValueType.INT16), 2),
    **dict.fromkeys((GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32), 4),
    **dict.fromkeys((GGUFValueType.UINT64, GGUFValueType.INT64, GGUFValueType.FLOAT64), 8),
}
ZEROS = bytes(1 << 20)


class _Broken(ValueError):
    """What is wrong with the file, without its name."""


@dataclass(frozen=True)
class _Entry:
    """A tensor as the list tells it: bytes of its values, and where they start in the data."""

    name: str
    size: int
    offset: int


def check_layout(path: Path) -> None:
    """Raise ``LowbitError`` unless everything that the file tells lies in it, once, and in its place.

    Its cost is that of reading the metadata; of the tensors' values nothing is read.
    """
    _walked(path)


def copy_keys(path: Path, copy: Path) -> None:
    """Write the metadata of a file, as it is, as one without tensors.

    Libraries that want the metadata alone read the list of tensors too, and fail on types that they do not know.
    Raises ``LowbitError`` as ``check_layout`` does.
    """
    end = _walked(path)
    with path.open("rb") as file:
        keys = bytearray(file.read(end))
    keys[COUNT : COUNT + 8] = bytes(8)
    copy.write_bytes(keys)


def _walked(path: Path) -> int:
    """The end of the keys, after the checks of ``check_layout``."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(data, path)
        try:
            return walk.file()
        except _Broken as error:
            raise LowbitError(f"{path} is not a complete GGUF file ({error}): fetch it again") from error


class _Walk:
    """A place in the file that moves forward, and never beyond its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.place, self.end = data, path, 4, len(data)  # behind the magic number

    def file(self) -> int:
        """The whole file; gives the place behind its keys, raises ``_Broken``."""
        self._version()
        tensors, keys = self._number("Q"), self._number("Q")
        for count, least, what in ((keys, LEAST_KEY, "keys"), (tensors, LEAST_TENSOR, "tensors")):
            if count > (self.end - self.place) // least:
                raise _Broken(f"it tells {count} {what} and has {self.end} bytes")
        alignment = self._keys(keys)
        end_of_keys = self.place
        self._data(list(self._tensors(tensors)), alignment)
        return end_of_keys

    def _version(self) -> None:
        version = self._number("I")
        if version & 0xFFFF == 0 and version:
            # Quantized blocks would be read in the wrong byte order without an error.
            raise LowbitError(f"{self.path} has the other byte order: convert it with gguf-convert-endian")
        if version not in VERSIONS:
            raise LowbitError(
                f"{self.path} is a GGUF file of version {version}; read are {VERSIONS[0]} and {VERSIONS[1]}: convert "
                "the model anew"
            )

    def _keys(self, count: int) -> int:
        """Walk over the metadata; the alignment that it sets."""
        seen: set[str] = set()
        alignment = ALIGNMENT
        for _ in range(count):
            key = self._name("key", seen)
            kind, start = self._kind(key), self.place
            self._value(kind, key)
            if key == ALIGNMENT_KEY:
                alignment = struct.unpack_from("<I", self.data, start)[0] if kind == GGUFValueType.UINT32 else 0
                if alignment == 0 or alignment & (alignment - 1):
                    raise _Broken(f"{key} is no power of two of the type uint32")
        return alignment

    def _value(self, kind: GGUFValueType, key: str) -> None:
        if kind == GGUFValueType.STRING:
            try:
                self._string(key).decode()
            except UnicodeDecodeError:
                raise _Broken(f"{shown(key)} is not UTF-8") from None
        elif kind != GGUFValueType.ARRAY:
            self._skip(SIZES[kind], key)
        else:
            inner, count = self._kind(key), self._number("Q")
            if inner == GGUFValueType.ARRAY:
                raise _Broken(f"{shown(key)} is an array of arrays")
            if inner != GGUFValueType.STRING:
                self._skip(count * SIZES[inner], key)
                return
            self._room(count * 8, key)
            for _ in range(count):
                self._skip(self._number("Q"), key)

    def _tensors(self, count: int) -> Iterator[_Entry]:
        """Walk over the list of tensors."""
        seen: set[str] = set()
        for _ in range(count):
            name = self._name("tensor", seen)
            rank = self._number("I")
            if rank > RANK:
                raise _Broken(f"{shown(name)} has {rank} dimensions, allowed are {RANK}")
            dims = [self._number("Q") for _ in range(rank)]
            kind, offset = self._number("I"), self._number("Q")
            yield _Entry(name, self._bytes_of(name, dims, kind), offset)

    @staticmethod
    def _bytes_of(name: str, dims: list[int], kind: int) -> int:
        """Bytes of a tensor's values; a row, the first dimension, consists of whole blocks."""
        try:
            block, size = BLOCK_SIZES[known_type(kind)]
        except ValueError:
            raise _Broken(
                f"{shown(name)} has the type {kind}, which the installed gguf package does not know"
            ) from None
        if dims and dims[0] % block:
            raise _Broken(f"{shown(name)} has rows of {dims[0]} values, no multiple of its type's {block}")
        return math.prod(dims) // block * size

    def _data(self, entries: list[_Entry], alignment: int) -> None:
        """Tensors without holes and overlaps up to the end of the file; behind them only zeros, as some disks add."""
        start = _padded(self.place, alignment)
        expected = 0
        for entry in entries:
            if entry.offset != expected:
                raise _Broken(f"{shown(entry.name)} lies at {entry.offset} of the data, expected at {expected}")
            if start + expected + entry.size > self.end:
                raise _Broken(f"{shown(entry.name)} ends at byte {start + expected + entry.size} of {self.end}")
            expected = _padded(expected + entry.size, alignment)
        last = start + expected if entries else self.place
        for place in range(last, self.end, len(ZEROS)):
            rest = self.data[place : place + len(ZEROS)]
            if rest != ZEROS[: len(rest)]:
                raise _Broken(f"{self.end - last} bytes behind the last tensor belong to none")

    def _name(self, what: str, seen: set[str]) -> str:
        raw = self._string(what)
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise _Broken(f"a {what}'s name is not UTF-8") from None
        if name in seen:
            raise _Broken(f"the {what} {shown(name)} is there twice")
        seen.add(name)
        return name

    def _kind(self, key: str) -> GGUFValueType:
        kind = self._number("I")
        try:
            return GGUFValueType(kind)
        except ValueError:
            raise _Broken(f"{shown(key)} has the unknown type {kind}") from None

    def _string(self, what: str) -> bytes:
        size = self._number("Q")
        self._skip(size, what)
        return self.data[self.place - size : self.place]

    def _number(self, code: str) -> int:
        size = struct.calcsize(f"<{code}")
        self._skip(size, "a number")
        value: int = struct.unpack_from(f"<{code}", self.data, self.place - size)[0]
        return value

    def _skip(self, size: int, what: str) -> None:
        self._room(size, what)
        self.place += size

    def _room(self, size: int, what: str) -> None:
        if size > self.end - self.place:
            raise _Broken(f"{shown(what)} at byte {self.place} takes {size} bytes of {self.end - self.place}")


def _padded(size: int, alignment: int) -> int:
    """The next multiple.

    >>> _padded(33, 32), _padded(64, 32)
    (64, 64)
    """
    return -(-size // alignment) * alignment
