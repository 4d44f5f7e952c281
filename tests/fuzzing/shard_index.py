"""Mutations of ``model.safetensors.index.json`` and of the set of shards that it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fuzzing.change import WRONG, Change, Mutator, Random, short
from fuzzing.json_files import load, of_text, of_tree, store
from fuzzing.safetensors_bytes import Shard

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FILES = (
    *("../x.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "./model-00001-of-00002.safetensors"),
    *("config.json", "missing.safetensors", "x\ny.safetensors", "x" * 300, "\x00", "model.bin", "~/x.safetensors"),
)


def _map(folder: Path) -> dict[str, Any]:
    return load(folder / INDEX)["weight_map"]


def _write(folder: Path, weight_map: Any) -> None:
    store(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def point_elsewhere(folder: Path, rng: Random) -> Change:
    weight_map = _map(folder)
    name, file = rng.choice(list(weight_map)), rng.choice([*FILES, *WRONG])
    _write(folder, weight_map | {name: file})
    return Change(f"index says {name} is in {short(file)}")


def point_everything_elsewhere(folder: Path, rng: Random) -> Change:
    file = rng.choice([*FILES, *WRONG])
    _write(folder, dict.fromkeys(_map(folder), file))
    return Change(f"index says everything is in {short(file)}")


def swap_files(folder: Path, rng: Random) -> Change:
    weight_map = _map(folder)
    name = rng.choice(list(weight_map))
    other = rng.choice([file.name for file in shards(folder) if file.name != weight_map[name]])
    _write(folder, weight_map | {name: other})
    return Change(f"index says {name} is in {other}, another shard")


def drop_entry(folder: Path, rng: Random) -> Change:
    weight_map = _map(folder)
    name = rng.choice(list(weight_map))
    del weight_map[name]
    _write(folder, weight_map)
    return Change(f"index without {name}")


def drop_shard_from_index(folder: Path, rng: Random) -> Change:
    file = rng.choice(shards(folder)).name
    _write(folder, {name: own for name, own in _map(folder).items() if own != file})
    return Change(f"index without the tensors of {file}")


def add_entry(folder: Path, rng: Random) -> Change:
    name = rng.choice(
        ["zz.weight", "model.layers.0.mlp.up_proj.bias", "model.layers.7.mlp.up_proj.weight", "", "../x"]
    )
    file = rng.choice([rng.choice(shards(folder)).name, *FILES])
    _write(folder, _map(folder) | {name: file})
    return Change(f"index says {short(name)} is in {short(file)}")


def repeat_entry(folder: Path, rng: Random) -> Change:
    """An entry twice, with two files: JSON readers take the last."""
    weight_map = _map(folder)
    name, file = rng.choice(list(weight_map)), rng.choice([*FILES, *(s.name for s in shards(folder))])
    text = json.dumps({"weight_map": weight_map})
    pair = f"{json.dumps(name)}: {json.dumps(file)}"
    first = rng.random() < 0.5
    text = text.replace('"weight_map": {', f'"weight_map": {{{pair}, ', 1) if first else f"{text[:-2]}, {pair}}}}}"
    (folder / INDEX).write_text(text)
    return Change(f"index has {name} twice, {'first' if first else 'last'} in {short(file)}")


def set_weight_map(folder: Path, rng: Random) -> Change:
    value = rng.choice(WRONG)
    _write(folder, value)
    return Change(f"weight_map = {short(value)}")


def remove_shard(folder: Path, rng: Random) -> Change:
    file = rng.choice(shards(folder))
    file.unlink()
    return Change(f"{file.name} removed")


def rename_shard(folder: Path, rng: Random) -> Change:
    file = rng.choice(shards(folder))
    file.rename(folder / "model-9.safetensors")
    return Change(f"{file.name} renamed")


def swap_shards(folder: Path, rng: Random) -> Change:
    """The content of two shards changes places."""
    first, second = rng.sample(shards(folder), 2)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return Change(f"{first.name} and {second.name} swapped")


def repeat_tensor(folder: Path, rng: Random) -> Change:
    """A second, different copy of a tensor in a shard that the index does not name for it."""
    weight_map = _map(folder)
    name = rng.choice(list(weight_map))
    value = Shard.read(folder / weight_map[name]).tensors[name]
    other = rng.choice([file for file in shards(folder) if file.name != weight_map[name]])
    shard = Shard.read(other)
    shard.tensors[name] = value.map(lambda v: v * 2 + 1)
    shard.write(other)
    return Change(f"{other.name} has another {name}, which the index does not name")


def add_unlisted_shard(folder: Path, rng: Random) -> Change:
    file = rng.choice(shards(folder))
    shard = Shard.read(file)
    shard.tensors = {name: value.map(lambda v: v * 2) for name, value in shard.tensors.items()}
    shard.write(folder / "model-00009-of-00009.safetensors")
    return Change(f"a shard that the index does not name, with other tensors of {file.name}")


def single_beside_index(folder: Path, rng: Random) -> Change:
    """Two saves in one folder: an index with its shards, and one file with other weights."""
    single = Shard({})
    for file in shards(folder):
        single.tensors |= {name: value.map(lambda v: v * 1.5) for name, value in Shard.read(file).tensors.items()}
    single.write(folder / SINGLE)
    kept = rng.random() < 0.5
    if not kept:
        for file in shards(folder):
            file.unlink()
    return Change(f"{SINGLE} with other weights beside the index {'and' if kept else 'without'} its shards")


def partial_single_beside_index(folder: Path, rng: Random) -> Change:
    shutil.copyfile(rng.choice(shards(folder)), folder / SINGLE)
    return Change(f"{SINGLE} with a part of the weights beside the index")


def no_index(folder: Path, rng: Random) -> Change:
    (folder / INDEX).unlink()
    return Change("shards without an index")


def consolidated(folder: Path, rng: Random) -> Change:
    """Another copy of the weights under the name that some publishers add."""
    shutil.copyfile(rng.choice(shards(folder)), folder / "consolidated.safetensors")
    return Change("consolidated.safetensors added")


MUTATORS: tuple[Mutator, ...] = (
    point_elsewhere,
    point_elsewhere,
    point_everything_elsewhere,
    swap_files,
    drop_entry,
    drop_shard_from_index,
    add_entry,
    add_entry,
    repeat_entry,
    set_weight_map,
    remove_shard,
    rename_shard,
    swap_shards,
    repeat_tensor,
    add_unlisted_shard,
    single_beside_index,
    partial_single_beside_index,
    no_index,
    consolidated,
    *of_text(INDEX),
    *of_tree(INDEX),
)
