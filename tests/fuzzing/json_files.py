"""Mutations that any JSON file can suffer: in its bytes, and at a place of its tree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzzing.change import NUMBERS, WRONG, Change, Mutator, Random, short

Place = tuple[Any, ...]  # keys and indices from the root


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def store(path: Path, content: Any) -> None:
    """NaN and Infinity as the literals that Python's reader takes."""
    path.write_text(json.dumps(content, indent=1))


def places(content: Any, place: Place = ()) -> Iterator[Place]:
    """Every place of a tree but the root; of a long list or dictionary the first entries."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[:40]:
        yield (*place, key)
        yield from places(value, (*place, key))


def parent(content: Any, place: Place) -> Any:
    for key in place[:-1]:
        content = content[key]
    return content


def value_at(content: Any, place: Place) -> Any:
    return parent(content, place)[place[-1]]


def told(path: Path, place: Place) -> str:
    return f"{path.name} {'.'.join(map(str, place))}"


def drop(name: str) -> Mutator:
    def dropped(folder: Path, rng: Random) -> Change:
        content = load(folder / name)
        place = rng.choice(list(places(content)))
        del parent(content, place)[place[-1]]
        store(folder / name, content)
        return Change(f"{told(folder / name, place)} dropped")

    return dropped


def retype(name: str) -> Mutator:
    def retyped(folder: Path, rng: Random) -> Change:
        content, value = load(folder / name), rng.choice(WRONG)
        place = rng.choice(list(places(content)))
        parent(content, place)[place[-1]] = value
        store(folder / name, content)
        return Change(f"{told(folder / name, place)} = {short(value)}")

    return retyped


def renumber(name: str) -> Mutator:
    """A number becomes another one: at an end of a range, doubled, halved, or written as a float."""

    def renumbered(folder: Path, rng: Random) -> Change:
        content = load(folder / name)
        numbers = [p for p in places(content) if type(value_at(content, p)) in (int, float)]
        place = rng.choice(numbers)
        old = value_at(content, place)
        value = rng.choice([*NUMBERS, old * 2, old // 2, old + 1, old - 1, float(old), str(old), -old])
        parent(content, place)[place[-1]] = value
        store(folder / name, content)
        return Change(f"{told(folder / name, place)} = {short(value)} (was {short(old)})")

    return renumbered


def rename(name: str) -> Mutator:
    def renamed(folder: Path, rng: Random) -> Change:
        content = load(folder / name)
        place = rng.choice([p for p in places(content) if isinstance(p[-1], str)])
        key = rng.choice([place[-1].upper(), place[-1] + " ", "", place[-1] + "\n", "_" + place[-1]])
        holder = parent(content, place)
        holder[key] = holder.pop(place[-1])
        store(folder / name, content)
        return Change(f"{told(folder / name, place)} renamed to {short(key)}")

    return renamed


def repeat_key(name: str) -> Mutator:
    """The same key twice, of which JSON readers take the last."""

    def repeated(folder: Path, rng: Random) -> Change:
        path = folder / name
        content, value = load(path), rng.choice([*WRONG, *NUMBERS])
        key = rng.choice(list(content))
        pair, body = f"{json.dumps(key)}: {json.dumps(value)}", path.read_text().strip()
        first = rng.random() < 0.5
        path.write_text(f"{{{pair}, {body[1:]}" if first else f"{body[:-1]}, {pair}}}")
        return Change(f"{name} {key} twice, {'first' if first else 'last'} {short(value)}")

    return repeated


DAMAGE: dict[str, Any] = {
    "empty": lambda raw: b"",
    "a byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "UTF-16": lambda raw: raw.decode().encode("utf-16"),
    "UTF-32": lambda raw: raw.decode().encode("utf-32"),
    "not UTF-8": lambda raw: raw.replace(b":", b":\xff", 1),
    "a NUL": lambda raw: raw.replace(b":", b":\x00", 1),
    "all NULs": lambda raw: bytes(len(raw)),
    "a list": lambda raw: b"[" + raw + b"]",
    "a number": lambda raw: b"17",
    "null": lambda raw: b"null",
    "a string": lambda raw: b'"x"',
    "an empty object": lambda raw: b"{}",
    "nested deeply": lambda raw: b"[" * 100_000,
    "nested deeply and closed": lambda raw: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a deep field": lambda raw: raw.strip()[:-1] + b', "zz": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "an integer of 5000 digits": lambda raw: raw.strip()[:-1] + b', "zz": ' + b"9" * 5000 + b"}",
    "a lone surrogate": lambda raw: raw.strip()[:-1] + b', "zz": "\\ud800"}',
    "a surrogate as a key": lambda raw: raw.strip()[:-1] + b', "\\ud800": 1}',
    "a trailing comma": lambda raw: raw.strip()[:-1] + b",}",
    "trailing text": lambda raw: raw + b"\nversion https://git-lfs\n",
    "an LFS pointer": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n",
    "an HTML page": lambda raw: b"<!doctype html><html><body>404</body></html>",
    "comments": lambda raw: b"// config\n" + raw,
    "single quotes": lambda raw: raw.replace(b'"', b"'"),
    "carriage returns": lambda raw: raw.replace(b"\n", b"\r\n"),
}


def damage(name: str) -> Mutator:
    def damaged(folder: Path, rng: Random) -> Change:
        kind = rng.choice(list(DAMAGE))
        (folder / name).write_bytes(DAMAGE[kind]((folder / name).read_bytes()))
        return Change(f"{name} is {kind}")

    return damaged


def truncate(name: str) -> Mutator:
    def truncated(folder: Path, rng: Random) -> Change:
        raw = (folder / name).read_bytes()
        size = rng.randrange(len(raw))
        (folder / name).write_bytes(raw[:size])
        return Change(f"{name} cut at byte {size} of {len(raw)}")

    return truncated


def remove(name: str) -> Mutator:
    def removed(folder: Path, rng: Random) -> Change:
        (folder / name).unlink()
        return Change(f"{name} removed")

    return removed


def not_a_file(name: str) -> Mutator:
    """A folder, a link to nowhere or a link to itself in a file's place."""

    def replaced(folder: Path, rng: Random) -> Change:
        path, kind = folder / name, rng.choice(["a folder", "a link to nowhere", "a link to itself"])
        path.unlink()
        if kind == "a folder":
            path.mkdir()
        else:
            path.symlink_to("nowhere" if kind == "a link to nowhere" else name)
        return Change(f"{name} is {kind}")

    return replaced


def of_text(name: str) -> tuple[Mutator, ...]:
    """Mutations of a file's bytes; the damage first and twice, since it has many kinds."""
    return (damage(name), damage(name), truncate(name), remove(name), not_a_file(name))


def of_tree(name: str) -> tuple[Mutator, ...]:
    """Mutations at a place of a file's tree."""
    return (drop(name), retype(name), renumber(name), rename(name), repeat_key(name))
