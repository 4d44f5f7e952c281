"""Mutations of ``model.safetensors``: its header, and the tensors in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuzzing.change import NUMBERS, WRONG, Change, Mutator, Random, short
from fuzzing.json_files import DAMAGE, not_a_file, remove, truncate
from fuzzing.safetensors_bytes import DTYPES, Shard, Stored, joined

SINGLE = "model.safetensors"
NAMES = (
    "",
    "x",
    "model.layers.0.mlp.up_proj",
    "model.layers.00.mlp.up_proj.weight",
    "__metadata__",
    "a\nb",
    "\x1b[31m",
)
EXTRA = (
    *("zz", "model.layers.0.mlp.up_proj.bias", "model.layers.0.self_attn.q_proj.bias", "model.layers.0.zz.weight"),
    *("model.layers.2.mlp.up_proj.weight", "model.norm.bias", "lm_head.bias", "lm_head.weight", "norm.weight"),
    *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.q_norm.weight", "layers.0.zz.weight"),
    *("model.embed_tokens.weight_scale", "model.layers.0.mlp.gate_proj.weight_scale", "embed_tokens.weight"),
    *("model.layers.0.mlp.up_proj.weight.weight", "model.layers.-1.mlp.up_proj.weight", "model.language_model.zz"),
)


def _header(folder: Path) -> tuple[dict[str, Any], bytes]:
    shard = Shard.read(folder / SINGLE)
    return shard.header(), shard.data


def _store(folder: Path, header: dict[str, Any], data: bytes) -> None:
    (folder / SINGLE).write_bytes(joined(json.dumps(header).encode(), data))


def _pick(shard: Shard, rng: Random) -> str:
    return rng.choice(list(shard.tensors))


def lie_about_header_size(folder: Path, rng: Random) -> Change:
    header, data = _header(folder)
    raw = json.dumps(header).encode()
    size = rng.choice([0, 1, len(raw) - 1, len(raw) + 1, 10**8 + 1, 2**31, 2**63, 2**64 - 1, len(raw) + len(data)])
    (folder / SINGLE).write_bytes(joined(raw, data, size))
    return Change(f"header's size told as {size}, it is {len(raw)}")


def damage_header(folder: Path, rng: Random) -> Change:
    header, data = _header(folder)
    kind = rng.choice(list(DAMAGE))
    (folder / SINGLE).write_bytes(joined(DAMAGE[kind](json.dumps(header).encode()), data))
    return Change(f"safetensors header is {kind}")


def flip_header_byte(folder: Path, rng: Random) -> Change:
    raw = bytearray((folder / SINGLE).read_bytes())
    place = rng.randrange(8 + int.from_bytes(raw[:8], "little"))
    raw[place] ^= 1 << rng.randrange(8)
    (folder / SINGLE).write_bytes(raw)
    return Change(f"a bit of byte {place} of the header flipped")


def append(folder: Path, rng: Random) -> Change:
    with (folder / SINGLE).open("ab") as file:
        file.write(b"\x00" * 8)
    return Change("8 bytes behind the data")


def set_field(folder: Path, rng: Random) -> Change:
    header, data = _header(folder)
    name = rng.choice([key for key in header if key != "__metadata__"])
    field = rng.choice(["dtype", "shape", "data_offsets"])
    start, end = header[name]["data_offsets"]
    value = rng.choice(
        {
            "dtype": ["F33", "f32", "I32", "F16", "BF16", "F64", "F8_E4M3", "BOOL", "F4", "C64", "U16", *WRONG],
            "shape": [[], [-1, 32], [2**40, 2**40], [0], [1, *header[name]["shape"]], [1.5], ["32"], *WRONG],
            "data_offsets": [
                *([0, 0], [end, start], [start + 4, end], [start, end + 4], [start, 2**63], [-4, 4], [start]),
                *([start + 1, end + 1], [0, end - start], *WRONG),
            ],
        }[field]
    )
    header[name][field] = value
    _store(folder, header, data)
    return Change(f"header of {name}: {field} = {short(value)}")


def drop_field(folder: Path, rng: Random) -> Change:
    header, data = _header(folder)
    name = rng.choice([key for key in header if key != "__metadata__"])
    field = rng.choice(["dtype", "shape", "data_offsets"])
    del header[name][field]
    _store(folder, header, data)
    return Change(f"header of {name} without {field}")


def set_entry(folder: Path, rng: Random) -> Change:
    header, data = _header(folder)
    name, value = rng.choice(list(header)), rng.choice(WRONG)
    header[name] = value
    _store(folder, header, data)
    return Change(f"header says {name} is {short(value)}")


def set_metadata(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    shard.metadata = rng.choice(
        [None, {}, {"format": "tf"}, {"format": "np"}, {"format": "x"}, {"format": 3}, *WRONG]
    )
    shard.write(folder / SINGLE)
    return Change(f"__metadata__ = {short(shard.metadata)}")


def repeat_name(folder: Path, rng: Random) -> Change:
    """A tensor's entry twice, the second with the place of another of the same shape."""
    header, data = _header(folder)
    name = rng.choice([key for key in header if key != "__metadata__"])
    same = [
        e for key, e in header.items() if key not in ("__metadata__", name) and e["shape"] == header[name]["shape"]
    ]
    entry = rng.choice(same or [header[name]])
    raw = f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(entry)}}}"
    (folder / SINGLE).write_bytes(joined(raw.encode(), data))
    return Change(f"{name} twice in the header")


def overlap(folder: Path, rng: Random) -> Change:
    """Two tensors over the same bytes."""
    header, data = _header(folder)
    first, second = rng.sample([key for key in header if key != "__metadata__"], 2)
    header[second] = {**header[second], "data_offsets": header[first]["data_offsets"]}
    _store(folder, header, data)
    return Change(f"{second} over the bytes of {first}")


def rename_tensor(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    old = _pick(shard, rng)
    new = rng.choice([*NAMES, *EXTRA, old.removeprefix("model."), "model." + old, old.upper()])
    shard.tensors[new] = shard.tensors.pop(old)
    shard.write(folder / SINGLE)
    return Change(f"{old} renamed to {short(new)}")


def rename_all(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    prefix = rng.choice(
        ["-", "transformer.", "model.", "language_model.", "base_model.model.", "_orig_mod.", "module."]
    )
    change = (lambda n: n.removeprefix("model.")) if prefix == "-" else (lambda n: prefix + n)
    shard.tensors = {change(name): value for name, value in shard.tensors.items()}
    shard.write(folder / SINGLE)
    return Change("names without 'model.'" if prefix == "-" else f"names behind '{prefix}'")


def drop_tensor(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    name = _pick(shard, rng)
    del shard.tensors[name]
    shard.write(folder / SINGLE)
    return Change(f"{name} dropped")


def drop_all(folder: Path, rng: Random) -> Change:
    Shard({}).write(folder / SINGLE)
    return Change("no tensors")


def add_tensor(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    name, shape = rng.choice(EXTRA), rng.choice([(32,), (96, 32), (48, 32), (4,), (), (0,)])
    if rng.random() < 0.3:  # the shape of a tensor that it might be taken for
        shape = tuple(shard.tensors[_pick(shard, rng)].shape)
    shard.tensors[name] = Stored.of(torch.full(shape, 0.5))
    shard.write(folder / SINGLE)
    return Change(f"{name} {shape} added")


def swap_tensors(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    first, second = rng.sample(list(shard.tensors), 2)
    shard.tensors[first], shard.tensors[second] = shard.tensors[second], shard.tensors[first]
    shard.write(folder / SINGLE)
    return Change(f"{first} and {second} swapped")


def set_dtype(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    dtype, every = rng.choice(list(DTYPES)), rng.random() < 0.3
    for name in list(shard.tensors) if every else [_pick(shard, rng)]:
        shard.tensors[name] = Stored.of(shard.tensors[name].value(), dtype)
    shard.write(folder / SINGLE)
    return Change(f"{'all tensors' if every else name} as {dtype}")


def _with_number(value: Tensor, number: float, place: int) -> Tensor:
    value = value.clone()
    value.view(-1)[place % value.numel()] = number
    return value


def set_number(folder: Path, rng: Random) -> Change:
    """NaN, infinities and numbers at the ends; in float64 also some that float32 does not hold."""
    shard = Shard.read(folder / SINGLE)
    name, place = _pick(shard, rng), rng.randrange(10**6)
    number = rng.choice([float("nan"), float("inf"), float("-inf"), 1e300, 3e38, 1e20, 1e-45, -0.0])
    dtype = "F64" if number == 1e300 else "F32"
    value = _with_number(shard.tensors[name].value().double(), number, place)
    shard.tensors[name] = Stored.of(value, dtype)
    shard.write(folder / SINGLE)
    return Change(f"{number} in {name} ({dtype})")


def scale_tensor(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    name, factor = _pick(shard, rng), rng.choice([0.0, 1e-30, 1e10, 1e30, -1.0])
    shard.tensors[name] = shard.tensors[name].map(lambda v: v * factor)
    shard.write(folder / SINGLE)
    return Change(f"{name} times {factor}")


RESHAPES: dict[str, Any] = {
    "transposed": lambda v: v.T if v.ndim == 2 else v[None],
    "a dimension more": lambda v: v[..., None],
    "flat": lambda v: v.flatten(),
    "one row less": lambda v: v[:-1],
    "one row more": lambda v: torch.cat([v, v[:1]]),
    "empty": lambda v: v[:0],
    "a scalar": lambda v: v.flatten()[0],
}


def reshape(folder: Path, rng: Random) -> Change:
    shard = Shard.read(folder / SINGLE)
    name, kind = _pick(shard, rng), rng.choice(list(RESHAPES))
    shard.tensors[name] = shard.tensors[name].map(RESHAPES[kind])
    shard.write(folder / SINGLE)
    return Change(f"{name} {kind}")


def set_number_anywhere(folder: Path, rng: Random) -> Change:
    """A dimension or an offset in the header becomes a number at an end."""
    header, data = _header(folder)
    name = rng.choice([key for key in header if key != "__metadata__"])
    field = rng.choice(["shape", "data_offsets"])
    value = [*header[name][field]]
    value[rng.randrange(len(value))] = rng.choice(NUMBERS)
    header[name][field] = value
    _store(folder, header, data)
    return Change(f"header of {name}: {field} = {short(value)}")


MUTATORS: tuple[Mutator, ...] = (
    lie_about_header_size,
    damage_header,
    flip_header_byte,
    flip_header_byte,
    append,
    set_field,
    set_field,
    set_number_anywhere,
    drop_field,
    set_entry,
    set_metadata,
    repeat_name,
    overlap,
    rename_tensor,
    rename_tensor,
    rename_all,
    drop_tensor,
    drop_all,
    add_tensor,
    add_tensor,
    swap_tensors,
    set_dtype,
    set_dtype,
    set_number,
    scale_tensor,
    reshape,
    truncate(SINGLE),
    remove(SINGLE),
    not_a_file(SINGLE),
)
