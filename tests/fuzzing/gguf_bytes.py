"""A GGUF file taken apart, so that it can be put together wrongly.

``magic, version, number of tensors, number of facts | facts: key, type, value | tensors: name, shape, type, offset |
padding | data``; every offset counts from the start of the data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALIGNMENT = 32
STRING, ARRAY = 8, 9
PACKED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, INT32, FLOAT32, BOOL, UINT64 = 4, 5, 6, 7, 10


@dataclass(frozen=True)
class Fact:
    """A metadata value as it lies in the file."""

    kind: int
    raw: bytes

    @classmethod
    def of(cls, value: Any, kind: int | None = None) -> Fact:
        """A value of a Python type, or of a kind of the format."""
        if kind is None:
            kinds = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING, list: ARRAY}
            kind = kinds[type(value)]
        if kind == STRING:
            return cls(kind, _string(value.encode() if isinstance(value, str) else value))
        if kind == ARRAY:
            items = [cls.of(item) for item in value]
            inner = items[0].kind if items else UINT32
            return cls(kind, struct.pack("<IQ", inner, len(items)) + b"".join(item.raw for item in items))
        return cls(kind, struct.pack(f"<{PACKED[kind]}", value))

    @property
    def number(self) -> Any:
        """The value of a scalar."""
        return struct.unpack(f"<{PACKED[self.kind]}", self.raw)[0]


@dataclass(frozen=True)
class Info:
    """What the file says of a tensor; dimensions as they are stored, the innermost first."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int

    def raw(self) -> bytes:
        head = _string(self.name.encode()) + struct.pack("<I", len(self.dims))
        return head + b"".join(struct.pack("<Q", d) for d in self.dims) + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class Gguf:
    """A file: metadata in order (keys may repeat), tensors, data; counts may lie."""

    facts: list[tuple[str, Fact]]
    infos: list[Info]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    fact_count: int | None = None

    @classmethod
    def read(cls, path: Path) -> Gguf:
        raw = path.read_bytes()
        reader = _Reader(raw)
        magic, version = reader.take(4), reader.number("I")
        tensors, facts = reader.number("Q"), reader.number("Q")
        read = [(reader.string().decode(), reader.fact()) for _ in range(facts)]
        infos = list(reader.infos(tensors))
        return cls(read, infos, raw[-(-reader.place // ALIGNMENT) * ALIGNMENT :], magic, version)

    def write(self, path: Path) -> None:
        counts = [len(self.infos), len(self.facts)]
        counts = [
            n if told is None else told for n, told in zip(counts, (self.tensor_count, self.fact_count), strict=True)
        ]
        head = self.magic + struct.pack("<IQQ", self.version, *counts)
        for key, fact in self.facts:
            head += _string(key.encode()) + struct.pack("<I", fact.kind) + fact.raw
        head += b"".join(info.raw() for info in self.infos)
        path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + self.data)

    def get(self, key: str) -> Fact:
        return dict(self.facts)[key]

    def put(self, key: str, fact: Fact) -> None:
        """Replace a fact in its place, or add it."""
        keys = [own for own, _ in self.facts]
        if key in keys:
            self.facts[keys.index(key)] = (key, fact)
        else:
            self.facts.append((key, fact))

    @property
    def architecture(self) -> str:
        return self.get("general.architecture").raw[8:].decode()


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.place = raw, 0

    def take(self, size: int) -> bytes:
        self.place += size
        return self.raw[self.place - size : self.place]

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> bytes:
        return self.take(self.number("Q"))

    def fact(self) -> Fact:
        kind = self.number("I")
        return Fact(kind, self.value(kind))

    def value(self, kind: int) -> bytes:
        if kind == STRING:
            return _string(self.string())
        if kind != ARRAY:
            return self.take(struct.calcsize(f"<{PACKED[kind]}"))
        inner, count = self.number("I"), self.number("Q")
        return struct.pack("<IQ", inner, count) + b"".join(self.value(inner) for _ in range(count))

    def infos(self, count: int) -> Iterator[Info]:
        for _ in range(count):
            name, rank = self.string().decode(), self.number("I")
            yield Info(name, tuple(self.number("Q") for _ in range(rank)), self.number("I"), self.number("Q"))
