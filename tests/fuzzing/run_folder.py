"""Mutations of a finished run's folder: its manifest, and the files that it lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fuzzing.change import SAME, Anything, Change, Mutator, Random
from fuzzing.json_files import of_text, of_tree
from fuzzing.safetensors_bytes import Shard

MANIFEST, BLOCK = "lowbit.json", "block-00000.safetensors"
# What these say is how codes and inputs are read: another valid value is another valid model.
READ_WITH = ("identity.scheme", "quantized", "layouts")


def _manifest(mutator: Mutator) -> Mutator:
    """A mutator of the manifest, after which the run computes as before or is refused."""

    def mutated(folder: Path, rng: Random) -> Change:
        change = mutator(folder, rng)
        free = any(f"{MANIFEST} {key}" in change.text for key in READ_WITH)
        # Without its manifest it is a compressed-tensors folder, whose inputs are read as float ones; a line says so.
        config = (folder / "config.json").read_text()
        free |= not (folder / MANIFEST).exists() and '"input_activations": {' in config
        return replace(change, expect=Anything() if free else SAME)

    return mutated


def drop_tensor(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / BLOCK)
    name = rng.choice(list(shard.tensors))
    del shard.tensors[name]
    shard.write(folder / BLOCK)
    return Change(f"{name} dropped", SAME)


def shorten_tensor(folder: Path, rng: Random) -> Change:
    """The last row of packed codes, scales or zero points is missing."""
    shard = Shard.read(folder / BLOCK)
    name = rng.choice([name for name, stored in shard.tensors.items() if len(stored.shape) == 2])
    stored = shard.tensors[name]
    rows = stored.shape[0]
    raw = stored.raw[: len(stored.raw) // rows * (rows - 1)]
    shard.tensors[name] = replace(stored, shape=[rows - 1, *stored.shape[1:]], raw=raw)
    shard.write(folder / BLOCK)
    return Change(f"{name} without its last row", SAME)


def relabel_tensor(folder: Path, rng: Random) -> Change:
    """The same bytes as numbers of another type of the same size."""
    shard = Shard.read(folder / BLOCK)
    name = rng.choice(list(shard.tensors))
    stored = shard.tensors[name]
    other = {"F32": "I32", "I32": "F32", "F16": "I16", "BF16": "I16", "I64": "F64", "I8": "U8", "U8": "I8"}
    shard.tensors[name] = replace(stored, dtype=other[stored.dtype])
    shard.write(folder / BLOCK)
    return Change(f"{name} as {other[stored.dtype]}", SAME)


MUTATORS: tuple[Mutator, ...] = (
    *(_manifest(mutator) for mutator in (*of_text(MANIFEST), *of_tree(MANIFEST), *of_tree(MANIFEST))),
    drop_tensor,
    shorten_tensor,
    relabel_tensor,
)
