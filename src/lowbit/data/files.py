"""Text files as streams, in memory that does not depend on their size: plain text, JSON lines, JSON, Parquet.

A stream begins at any position of a file, so that windows of a file of many gigabytes are drawn without reading it.
A position is a byte in a text file and a row in the others; the stream begins at the first line, word or row behind
it. Text is UTF-8, or UTF-16 or UTF-32 if the file's byte order mark says so; anything else is refused with the place
of the first wrong byte, because guessing an encoding gives wrong text without an error.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lowbit.errors import LowbitError, MissingExtra

PLAIN, ROWS = (".txt", ".raw", ".utf8", ".md"), (".jsonl", ".json", ".parquet")
SUFFIXES = (*PLAIN, *ROWS)
PATHS = f"a path ending in {', '.join(SUFFIXES)}"
CHUNK = 1 << 16  # bytes read at once
WORD = 1 << 12  # characters searched for the start of a word
JSON_BYTES = 1 << 28  # a .json file is parsed whole
_MARKS = (  # byte order mark, encoding behind it, bytes of a code unit; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le", 4),
    (codecs.BOM_UTF32_BE, "utf-32-be", 4),
    (codecs.BOM_UTF8, "utf-8", 1),
    (codecs.BOM_UTF16_LE, "utf-16-le", 2),
    (codecs.BOM_UTF16_BE, "utf-16-be", 2),
    (b"", "utf-8", 1),
)


@dataclass(frozen=True)
class Row:
    """A row of a data file: its fields, and where it is, for errors."""

    content: Any
    where: str


@dataclass(frozen=True)
class TextFile:
    """A file of text.

    Attributes:
        path: the file.
        size: its bytes.
        encoding, start, unit: from its byte order mark: the encoding, the bytes of the mark, bytes of a code unit.
    """

    path: Path
    size: int
    encoding: str
    start: int
    unit: int

    def parts(self, position: int = 0, *, lines: bool = False) -> Iterator[str]:
        """The text in parts, from byte ``position`` on: from the next word, or the next line with ``lines``."""
        with _open(self.path) as file:
            at = self._seek(file, position)
            decoder = codecs.getincrementaldecoder(self.encoding)()
            skipping, skipped = position > self.start, 0
            while True:
                block, held = file.read(CHUNK), len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    place, name = at - held + error.start, self.encoding[:6].upper().rstrip("-")
                    raise LowbitError(f"'{self.path}' is not {name} at byte {place}: convert it to UTF-8") from error
                at += len(block)
                if skipping:
                    found = _next_line(text) if lines else _next_word(text, WORD - skipped)
                    skipped += len(text)
                    text, skipping = ("", True) if found is None else (text[found:], False)
                if text:
                    yield text
                if not block:
                    return

    def _seek(self, file: BinaryIO, position: int) -> int:
        """Go to the first whole character at or behind a byte position; returns where that is."""
        at = max(self.start, position - (position - self.start) % self.unit)
        file.seek(at)
        if position <= self.start:
            return at
        head = file.read(4)
        extra = 0
        if self.encoding == "utf-8":
            extra = next((i for i, byte in enumerate(head) if byte & 0xC0 != 0x80), 0)
        elif self.unit == 2 and len(head) >= 2:
            high = head[1] if self.encoding.endswith("le") else head[0]
            extra = 2 if 0xDC <= high <= 0xDF else 0  # the second half of a pair
        file.seek(at + extra)
        return at + extra


def _next_line(text: str) -> int | None:
    found = text.find("\n")
    return None if found < 0 else found + 1


def _next_word(text: str, limit: int) -> int | None:
    """Start of the next word; in text without spaces, the place after ``limit`` characters."""
    for index, character in enumerate(text[: max(limit, 0)]):
        if character.isspace():
            return index + 1
    return max(limit, 0) if len(text) >= limit else None


def text_file(path: Path) -> TextFile:
    """A file of text; raises ``LowbitError`` if it cannot be read."""
    with _open(path) as file:
        head = file.read(4)
        size = file.seek(0, 2)
    mark, encoding, unit = next(entry for entry in _MARKS if head.startswith(entry[0]))
    return TextFile(path, size, encoding, len(mark), unit)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise LowbitError(f"cannot read '{path}': {error.strerror or error}; give {PATHS}") from error


@dataclass(frozen=True)
class RowFile:
    """A file of rows.

    Attributes:
        path: the file.
        size: number of positions.
        fields: the fields that are read; other columns of a Parquet file are left alone.
    """

    path: Path
    size: int
    fields: tuple[str, ...]

    def rows(self, position: int = 0) -> Iterator[Row]:
        """The rows behind a position."""
        suffix = self.path.suffix.lower()
        if suffix == ".jsonl":
            return _json_lines(text_file(self.path), position)
        if suffix == ".json":
            return _listed(_json_rows(self.path), self.path, position)
        return _parquet_rows(self.path, self.fields, position)


def row_file(path: Path, fields: tuple[str, ...]) -> RowFile:
    """A ``.jsonl``, ``.json`` or ``.parquet`` file; raises ``LowbitError`` if it cannot be read."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return RowFile(path, text_file(path).size, fields)
    if suffix == ".json":
        return RowFile(path, len(_json_rows(path)), fields)
    return RowFile(path, _parquet(path).metadata.num_rows, fields)


def _json_lines(file: TextFile, position: int) -> Iterator[Row]:
    number = 0
    for line in _lines(file.parts(position, lines=True)):
        number += 1
        if not line.strip():
            continue
        where = f"'{file.path}' line {number}" if position == 0 else f"'{file.path}' near byte {position}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        yield Row(content, where)


def _lines(parts: Iterator[str]) -> Iterator[str]:
    """Lines that end with a line feed only: other separators occur inside JSON strings."""
    held: list[str] = []
    for part in parts:
        *whole, rest = part.split("\n")
        for line in whole:
            yield "".join([*held, line])
            held = []
        held.append(rest)
    yield "".join(held)


def _json_rows(path: Path) -> list[Any]:
    file = text_file(path)
    if file.size > JSON_BYTES:
        raise LowbitError(f"'{path}' has {file.size >> 20} MB, and .json is parsed whole: write it as .jsonl")
    try:
        content = json.loads("".join(file.parts()))
    except (ValueError, RecursionError) as error:
        raise LowbitError(f"'{path}' is not JSON ({' '.join(str(error).split())[:100]}): fix it") from error
    if not isinstance(content, list):
        raise LowbitError(f"'{path}' is not a JSON list of objects: write it as a list, or as .jsonl")
    return content


def _listed(rows: list[Any], path: Path, position: int) -> Iterator[Row]:
    for number, content in enumerate(rows[position:], position + 1):
        yield Row(content, f"'{path}' entry {number}")


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", "a .parquet file") from error
    try:
        return parquet.ParquetFile(path)
    except ArrowException as error:
        raise LowbitError(f"'{path}' is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise LowbitError(f"cannot read '{path}': {error.strerror or error}; give {PATHS}") from error


def _parquet_rows(path: Path, fields: tuple[str, ...], position: int) -> Iterator[Row]:
    file, number = _parquet(path), 0
    columns = [name for name in fields if name in file.schema_arrow.names]
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if number + count <= position:
            number += count
            continue
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                if number + batch.num_rows <= position:
                    number += batch.num_rows
                    continue
                for content in batch.to_pylist():
                    number += 1
                    if number > position:
                        yield Row(content, f"'{path}' row {number}")
        except (OSError, ValueError) as error:
            raise LowbitError(f"'{path}' cannot be read: {str(error).splitlines()[0]}") from error
