"""Checkpoints on disk: a lazy reader of safetensors folders, and atomic writes.

Which files count is decided as ``transformers`` decides it: the file that the config names, else
``model.safetensors``, else the index. Of an index only the file names count: a tensor is where a shard has it, and of
two the last one.

The reader validates its input: names in an index must be plain file names inside the folder, every shard that the
index names must exist, and weights must be finite. Tensors are copied from the file's memory map one block at a time,
so that a model larger than memory can be read.

The writer creates every file under a temporary name, flushes it to disk and renames it. A file with a final name is
complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit.checkpoints.partial import commit, partial_of
from lowbit.errors import LowbitError, one_line, shown

DEEPEST = 100  # lists and objects of a JSON file within each other; those of models have less than ten
_LONGEST_NAME = 255  # characters; no file system has longer names
SINGLE, INDEX, INDEX_SUFFIX = "model.safetensors", "model.safetensors.index.json", ".safetensors.index.json"


def weight_index(folder: Path) -> Path | None:
    """The index that decides which shards count; ``None`` where a single file counts, or nothing is there."""
    named = _named_weights(folder)
    if named is not None:
        return folder / named if named.endswith(INDEX_SUFFIX) else None
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return None
    return folder / INDEX


def weight_shards(folder: Path) -> list[str]:
    """Names of the files that hold the weights, in the order in which ``transformers`` reads them.

    Raises ``LowbitError`` for a folder without any, a missing shard, or a name outside the folder.
    """
    if (index := weight_index(folder)) is not None:
        return index_shards(index)
    file = _named_weights(folder) or SINGLE
    if not is_there(folder / file):
        raise LowbitError(
            f"{folder} has neither {SINGLE} nor {INDEX}: give a folder with safetensors weights"
            if file == SINGLE
            else f"{folder} lacks {file}, which its config.json names as its weights (transformers_weights)"
        )
    return [file]


def index_shards(index: Path) -> list[str]:
    """Names of the shards in an index, sorted; each exists beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LowbitError(f"{index} has no 'weight_map': fetch it again")
    for file in {str(value): value for value in weight_map.values()}.values():
        if not _is_file_name(file):
            raise LowbitError(f"{index} names the shard {shown(file)}: only plain file names are allowed there")
        if not is_there(index.parent / file):
            raise LowbitError(f"{index.parent} lacks the shard {file} that its index names: fetch it again")
    return sorted(set(weight_map.values()))


def _named_weights(folder: Path) -> str | None:
    """The file that ``config.json`` names under ``transformers_weights``, if it does."""
    config = folder / "config.json"
    name = read_json(config).get("transformers_weights") if config.is_file() else None
    if name is None:
        return None
    if not _is_file_name(name) or not name.endswith((".safetensors", INDEX_SUFFIX)):
        raise LowbitError(
            f"{config} names the weights {shown(name)} (transformers_weights): allowed is the name of a .safetensors "
            f"file or index in {folder}"
        )
    return str(name)


def is_there(path: Path) -> bool:
    """Whether a path with a name from a file's content is a file; no file has a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        return False


def _is_file_name(name: Any) -> bool:
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or name in ("", ".", ".."):
        return False
    return Path(name).name == name and "\\" not in name


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor: its shape, and its dtype as safetensors names it (``F16``, ``I32``)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredPart:
    """A matrix, or a vector, that is stored with others in one tensor.

    Attributes:
        stored: the tensor's name, of shape ``(count, ...)``.
        index: the place along its first dimension.
        rows: the rows there, or the entries of a vector.
        transposed: the matrices there are ``(in, out)``.
    """

    stored: str
    index: int
    rows: range | tuple[int, ...]
    transposed: bool

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape in a tensor of shape ``whole``; ``()`` where the tensor has no such part."""
        own = whole[1:][::-1] if self.transposed else whole[1:]
        fits = len(whole) in (2, 3) and self.index < whole[0] and all(row < own[0] for row in self.rows[-1:])
        return (len(self.rows), *own[1:]) if fits else ()

    def taken(self, whole: Any) -> Tensor:
        """The part of a tensor, or of a file's slice, of which no more than one index is read."""
        value: Tensor = whole[self.index]
        value = value.mT if self.transposed and value.ndim == 2 else value
        rows = self.rows
        return value[rows.start : rows.stop] if isinstance(rows, range) else value[list(rows)]


@dataclass(frozen=True)
class StoredRows:
    """Rows of what is stored in several tensors, one behind another, or of one that holds several.

    Attributes:
        stored: the tensors' names; they differ in their first dimension only.
        start, stop: the rows among those of all of them.
        total: how many rows these have.
    """

    stored: tuple[str, ...]
    start: int
    stop: int
    total: int

    def shape(self, wholes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape in tensors of shapes ``wholes``; ``()`` where they have other rows.

        >>> StoredRows(("q", "k"), 0, 12, 12).shape([(8, 1, 4), (4, 1, 4)])
        (12, 1, 4)
        """
        fits = all(wholes) and len({whole[1:] for whole in wholes}) == 1
        fits = fits and sum(whole[0] for whole in wholes) == self.total
        return (self.stop - self.start, *wholes[0][1:]) if fits else ()


class Checkpoint:
    """The tensors of a folder with ``model.safetensors`` or an index and its shards, read one by one."""

    def __init__(self, folder: Path, files: Sequence[str] = ()) -> None:
        """Read the index and every shard's header, or the headers of ``files`` only; no tensor is read yet.

        Raises ``LowbitError`` for a missing shard or a broken header.
        """
        self.folder = folder
        self._stand_in: dict[str, str] = {}
        self._parts: dict[str, StoredPart] = {}
        self._rows: dict[str, StoredRows] = {}
        self._in_file: dict[str, str] = {}  # names in files of tensors that have another name here
        self._file_of = {name: file for file in files or weight_shards(folder) for name in self._names_in(file)}

    def rename(self, rule: Callable[[str], str]) -> None:
        """From now on a tensor has the name that ``rule`` makes of its name in a file.

        Raises ``LowbitError`` if two tensors get one name.
        """
        files: dict[str, str] = {}
        for stored, file in self._file_of.items():
            name = rule(stored)
            if name in files:
                raise _two_names(self.folder, name, self.name_in_file(name) if name == stored else stored)
            files[name] = file
            if name != stored:
                self._in_file[name] = stored
        self._file_of = files

    def name_in_file(self, name: str) -> str:
        """What a tensor is called in its file."""
        return self._in_file.get(name, name)

    def names_in_files(self, name: str) -> list[str]:
        """What the tensors are called in their files that hold a tensor: one, unless it is quantized."""
        return [self.name_in_file(name)]

    def let_stand_in(self, stored: str, name: str) -> None:
        """From now on reads of ``name``, which the folder lacks, give ``stored``, the other name of one parameter."""
        self._stand_in[name] = stored

    def let_part_stand_in(self, part: StoredPart, name: str) -> None:
        """From now on reads of ``name``, which the folder lacks, give a part of a tensor that it has."""
        self._parts[name] = part

    def part(self, name: str) -> StoredPart | None:
        """Where a tensor of the model is stored with others in one; ``None``: it is not."""
        return self._parts.get(name)

    def let_rows_stand_in(self, rows: StoredRows, name: str) -> None:
        """From now on reads of ``name``, which the folder lacks, give rows of tensors that it has."""
        self._rows[name] = rows

    def rows(self, name: str) -> StoredRows | None:
        """The rows that are a tensor of the model which no tensor is; ``None``: there are none."""
        return self._rows.get(name)

    def holders(self, name: str) -> tuple[str, ...]:
        """Stored names of all tensors that hold a tensor of the model; none: it is missing."""
        if (rows := self._rows.get(name)) is not None:
            return rows.stored
        found = self.find(name)
        return () if found is None else (found,)

    def _names_in(self, file: str) -> list[str]:
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as shard:
                return list(shard.keys())
        except (SafetensorError, OSError) as error:
            raise LowbitError(
                f"{path} is not a complete safetensors file ({one_line(error)}): fetch it again"
            ) from error

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    @property
    def stored_names(self) -> dict[str, str]:
        """Names of all tensors in files, and the shard of each."""
        return {self.name_in_file(name): file for name, file in self._file_of.items()}

    @property
    def files(self) -> list[Path]:
        """The shards, sorted by name."""
        return [self.folder / file for file in sorted(set(self._file_of.values()))]

    def find(self, name: str) -> str | None:
        """The stored name of a model's tensor: itself, or without the leading ``model.`` (base-model checkpoints).

        For one that is a part of a tensor, that tensor's name; ``None`` for rows, see ``holders``.

        Raises ``LowbitError`` if both are stored.
        """
        found = [n for n in dict.fromkeys((name, name.removeprefix("model."))) if n in self._file_of]
        if len(found) > 1:
            raise _two_names(self.folder, *found)
        if not found and name in self._stand_in:
            return self.find(self._stand_in[name])
        if not found and name in self._parts:
            return self._parts[name].stored
        return found[0] if found else None

    def file_of(self, name: str) -> str:
        """The shard that holds a tensor, by its stored name."""
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A stored tensor's shape, from the header of its shard; raises ``LowbitError`` for one that is missing."""
        if name not in self._file_of:
            raise LowbitError(f"{self.folder} has no tensor '{name}': the checkpoint does not match its config.json")
        with safe_open(self.folder / self._file_of[name], framework="pt") as shard:
            return tuple(shard.get_slice(self.name_in_file(name)).get_shape())

    def headers(self) -> dict[str, Header]:
        """Every tensor's header by its stored name."""
        out: dict[str, Header] = {}
        ours = {stored: name for name, stored in self._in_file.items()}
        for file in self.files:
            with safe_open(file, framework="pt") as shard:
                slices = {ours.get(name, name): shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
                out |= {name: Header(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        return out

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors by the model's names, copied into memory; floating-point ones as ``dtype`` if given.

        Raises ``LowbitError`` for a tensor that is missing or holds NaN or infinity.
        """
        by_file: dict[str, list[tuple[str, str]]] = {}
        out: dict[str, Tensor] = {}
        for name in names:
            if (rows := self._rows.get(name)) is not None:
                whole = torch.cat(list(self.read(rows.stored, dtype).values()))
                out[name] = whole[rows.start : rows.stop].clone()
                continue
            stored = self.find(name)
            if stored is None:
                raise LowbitError(
                    f"{self.folder} has no tensor '{name}': the checkpoint does not match its config.json"
                )
            by_file.setdefault(self._file_of[stored], []).append((name, stored))
        for file, pairs in by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt") as shard:
                    for name, stored in pairs:
                        part, in_file = self._parts.get(name), self.name_in_file(stored)
                        whole = shard.get_tensor(in_file) if part is None else part.taken(shard.get_slice(in_file))
                        out[name] = self._copied(whole, in_file, file, dtype)
            except (SafetensorError, OSError) as error:
                raise LowbitError(f"cannot read {self.folder / file}: {one_line(error)}") from error
        return out

    def _copied(self, value: Tensor, name: str, file: str, dtype: torch.dtype | None) -> Tensor:
        if not value.is_floating_point():
            return value.clone()
        # torch has no arithmetic on eight bits.
        if not bool(torch.isfinite(value.float() if value.dtype.itemsize == 1 else value).all()):
            raise LowbitError(f"'{name}' in {self.folder / file} holds NaN or infinity: the checkpoint is broken")
        return value.to(dtype or value.dtype, copy=True)


def _two_names(folder: Path, one: str, other: str) -> LowbitError:
    return LowbitError(f"{folder} has both '{one}' and '{other}', two names of one tensor: delete one of them")


def block_params(
    checkpoint: Checkpoint, blocks: str, index: int, layer: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """A layer's parameters and stored buffers in float32, named ``7.mlp.up_proj.weight``.

    ``layer`` has their shapes by name within it.

    Folding transforms is arithmetic on weights, hence float32 whatever the file holds; 16-bit weights lose nothing.
    """
    shapes = {f"{blocks}.{index}.{name}": shape for name, shape in layer.items()}
    params = checkpoint.read(shapes, torch.float32)
    for name, value in params.items():
        if value.shape != shapes[name]:
            raise LowbitError(
                f"'{name}' in {checkpoint.folder} is {tuple(value.shape)}, config.json implies {tuple(shapes[name])}"
            )
    return {name.removeprefix(f"{blocks}."): value for name, value in params.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ``LowbitError`` for anything else, and for one that nests too deeply."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not UTF-8, no JSON, or an integer of thousands of digits
        raise LowbitError(f"cannot read {path}: {one_line(error)}") from error
    except RecursionError as error:
        raise _too_deep(path) from error
    if not isinstance(content, dict):
        raise LowbitError(f"{path} does not hold a JSON object")
    if _nests_deeper(content, DEEPEST):
        raise _too_deep(path)
    return content


def _nests_deeper(content: Any, limit: int) -> bool:
    """Whether lists and objects are within each other more than ``limit`` times.

    >>> _nests_deeper({"a": [1]}, 2), _nests_deeper({"a": [[]]}, 2)
    (False, True)
    """
    level = [content]
    for _ in range(limit):
        level = [inner for value in level for inner in _inner(value) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _inner(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _too_deep(path: Path) -> LowbitError:
    return LowbitError(f"{path} nests lists and objects more than {DEEPEST} deep: it is no file of a model's")


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
