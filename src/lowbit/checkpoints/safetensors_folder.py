"""A lazy reader of safetensors folders.

Weights must be finite. Tensors are copied from the file's memory map one block at a time, so that a model larger than
memory can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.checkpoints.shards import weight_shards
from lowbit.checkpoints.stored import Header, StoredPart, StoredRows
from lowbit.errors import LowbitError, one_line
from lowbit.finite import is_finite


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
        if not is_finite(value):
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
