"""Which files of a folder hold its weights.

That is decided as ``transformers`` decides it: the file that the config names, else ``model.safetensors``, else the
index. Of an index only the file names count: a tensor is where a shard has it, and of two the last one. Names must be
plain file names inside the folder, and every shard that the index names must exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.checkpoints.json_file import read_json
from lowbit.errors import LowbitError, shown

SINGLE, INDEX, INDEX_SUFFIX = "model.safetensors", "model.safetensors.index.json", ".safetensors.index.json"
_LONGEST_NAME = 255  # characters; no file system has longer names


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
