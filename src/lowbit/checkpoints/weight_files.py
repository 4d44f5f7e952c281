"""Which weight files of a folder count, in the order of ``transformers``, and which are there but unused.

Safetensors come before pickles, a single file before an index. Files that an earlier save left behind are named on
the screen and not read. Pickles of other names (``.pt``, ``.pth``), which ``transformers`` does not look for, count
where there is nothing else.
"""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.shards import INDEX, SINGLE, index_shards, weight_index, weight_shards
from lowbit.errors import LowbitError
from lowbit.progress import say

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHOWN = 3


def has_safetensors(folder: Path) -> bool:
    """Whether the folder has weights in safetensors format."""
    return weight_index(folder) is not None or (folder / SINGLE).is_file() or _names_weights(folder)


def pickles(folder: Path) -> list[Path]:
    """The pickled weight files: ``pytorch_model.bin``, else those of its index, else all ``.pt`` and ``.pth``."""
    if (folder / PICKLE).is_file():
        return [folder / PICKLE]
    if (folder / PICKLE_INDEX).is_file():
        return [folder / name for name in index_shards(folder / PICKLE_INDEX)]
    return sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])


def say_unused(folder: Path) -> None:
    """Name the weight files and indexes of the format in use that are there and not read, on one line."""
    if has_safetensors(folder):
        used, single, ending = {*weight_shards(folder)}, SINGLE, ".safetensors"
        index = weight_index(folder)
    else:
        used, single, ending = {path.name for path in pickles(folder)}, PICKLE, ".bin"
        index = None if single in used else folder / PICKLE_INDEX
    read = used | ({index.name} if index else set())
    ours = ("lowbit", "training_args", "optimizer", "scheduler", "adapter_")
    there = (path.name for path in folder.iterdir() if path.name.endswith((ending, f"{ending}.index.json")))
    unused = sorted(name for name in there if name not in read and not name.startswith(ours))
    if unused:
        more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
        chosen = single if single in used else index.name if index else min(used)
        say(f"{folder}: weights are read from {chosen}; unused: {', '.join(unused[:_SHOWN])}{more}")


def say_stale_index(checkpoint: Checkpoint) -> None:
    """Say so if the index in use lists tensors that none of its shards has: it is of another save."""
    if (index := weight_index(checkpoint.folder)) is None:
        return
    held = {*checkpoint.names}
    if gone := [name for name in read_json(index)["weight_map"] if name not in held]:
        say(f"{index} lists {len(gone)} tensors that its shards do not have ('{gone[0]}'): ignored")


def no_weights(folder: Path, allow_pickle: bool) -> LowbitError:
    """The error for a folder with a config and no weights that count."""
    if variants := sorted(path.name for path in [*folder.glob("model.*.safetensors"), *folder.glob("model.*.json")]):
        return LowbitError(
            f"{folder} has no weights but a variant of them ({variants[0]}), which transformers reads on request "
            f"only: rename it to {INDEX if variants[0].endswith('.json') else SINGLE}"
        )
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return LowbitError(
            f"{folder} has {others[0]} but neither {SINGLE} nor {INDEX}: fetch the index, or rename it"
        )
    hint = "" if allow_pickle else "; if the hub has pickled ones (.bin), pass --allow-pickle"
    return LowbitError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}{hint}")


def _names_weights(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("transformers_weights") is not None
