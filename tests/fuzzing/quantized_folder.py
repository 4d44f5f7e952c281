"""Mutations of a folder of another tool's quantized weights: what its config says of them, and their tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fuzzing.change import NUMBERS, SAME, WRONG, Anything, Change, Mutator, Random, short
from fuzzing.json_files import load, parent, places, store, told
from fuzzing.safetensors_bytes import Shard, Stored
from fuzzing.safetensors_file import RESHAPES, SINGLE

CONFIG, FIELD = "config.json", "quantization_config"
FLOATS = ("F16", "BF16", "F32")
# The same bytes as numbers of another type.
RELABELED = {
    "I32": "F32",
    "F32": "I32",
    "F16": "I16",
    "BF16": "I16",
    "U8": "I8",
    "I8": "U8",
    "I64": "F64",
    "F8_E4M3": "U8",
}


def _in_config(change: Callable[[Any, Any, Random], str]) -> Mutator:
    """A mutator of one place of the ``quantization_config``: other bits or groups are another model, or none."""

    def mutated(folder: Path, rng: Random) -> Change:
        content = load(folder / CONFIG)
        place = (FIELD, *rng.choice(list(places(content[FIELD]))))
        did = change(parent(content, place), place[-1], rng)
        store(folder / CONFIG, content)
        return Change(f"{told(folder / CONFIG, place)} {did}", Anything())

    return mutated


def _drop(holder: Any, key: Any, rng: Random) -> str:
    del holder[key]
    return "dropped"


def _set(holder: Any, key: Any, rng: Random) -> str:
    holder[key] = rng.choice([*WRONG, *NUMBERS])
    return f"= {short(holder[key])}"


def _codes(shard: Shard, rng: Random) -> str:
    """A tensor of a quantized weight: all but embeddings, head, norms."""
    return rng.choice([name for name in shard.tensors if "_proj." in name])


def drop_tensor(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    del shard.tensors[name := _codes(shard, rng)]
    shard.write(folder / SINGLE)
    return Change(f"{name} dropped", SAME)


def relabel_tensor(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    stored = shard.tensors[name := _codes(shard, rng)]
    other = RELABELED[stored.dtype]
    shard.tensors[name] = replace(stored, dtype=other)
    shard.write(folder / SINGLE)
    return Change(f"{name} as {other}", SAME)


def reshape_tensor(folder: Path, rng: Random) -> Change:
    """A square one transposed, or a scale as a scalar, has the right shape and other values."""
    shard = Shard.read(folder / SINGLE)
    name, kind = _codes(shard, rng), rng.choice(list(RESHAPES))
    stored = shard.tensors[name]
    changed = Stored.of(RESHAPES[kind](stored.value()), stored.dtype)
    shard.tensors[name] = changed
    shard.write(folder / SINGLE)
    return Change(f"{name} {kind}", Anything() if kind in ("transposed", "a scalar") else SAME)


def swap_tensors(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    first, second = _codes(shard, rng), _codes(shard, rng)
    shard.tensors[first], shard.tensors[second] = shard.tensors[second], shard.tensors[first]
    shard.write(folder / SINGLE)
    return Change(f"{first} and {second} swapped", Anything())


def add_tensor(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    module = _codes(shard, rng).rpartition(".")[0]
    last = rng.choice(("pre_quant_scale", "weight_scale_2", "lora_A", "x", "qweight_packed"))
    shard.tensors[f"{module}.{last}"] = shard.tensors[_codes(shard, rng)]
    shard.write(folder / SINGLE)
    return Change(f"{module}.{last} added", SAME)


def set_scale(folder: Path, rng: Random) -> Change:
    """NaN, an infinity or a number at an end in a scale."""
    shard = Shard.read(folder / SINGLE)
    name = rng.choice([n for n, stored in shard.tensors.items() if "_proj." in n and stored.dtype in FLOATS])
    number, place = rng.choice([float("nan"), float("inf"), 6e4, -1.0, 0.0, 1e-7]), rng.randrange(10**6)
    stored = shard.tensors[name]
    value = stored.value().clone()
    value.view(-1)[place % value.numel()] = number
    shard.tensors[name] = Stored.of(value, stored.dtype)
    shard.write(folder / SINGLE)
    return Change(f"{number} in {name}", Anything())


MUTATORS: tuple[Mutator, ...] = (
    _in_config(_drop),
    _in_config(_set),
    _in_config(_set),
    drop_tensor,
    relabel_tensor,
    reshape_tensor,
    swap_tensors,
    add_tensor,
    set_scale,
)
