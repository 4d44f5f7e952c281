"""Mutations of what a ``.gguf`` file says of its tensors, of its counts and of its bytes.

A reader that follows an offset or a type blindly computes with other numbers; llama.cpp asks that tensors lie one
behind the other, without holes or overlaps.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.change import SAME, Anything, Change, Expect, Mutator, Patched, Random, Refusal, short
from fuzzing.gguf_bytes import Gguf, Info
from fuzzing.gguf_facts import HEAD_DIM, ROPE


def llama3_frequencies(path: Path, rng: Random) -> Change:
    """Llama 3's scaled rotary embedding, which files hold as divisors of the frequencies; or divisors of 1."""
    file = Gguf.read(path)
    low, high, factor, length = 1.0, 4.0, 8.0, 64
    plain = 1.0 / 10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    smooth = np.clip((length * plain / (2 * np.pi) - low) / (high - low), 0, 1)
    divisors = plain / (plain * (smooth + (1 - smooth) / factor))
    parameters = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
        **ROPE,
    }
    scaled = rng.random() < 0.7
    _append(file, "rope_freqs.weight", divisors if scaled else np.ones(HEAD_DIM // 2))
    file.write(path)
    text = f"rope_freqs.weight of {'Llama 3' if scaled else 'ones'}"
    return Change(text, Patched({"rope_parameters": parameters}) if scaled else SAME)


def _append(file: Gguf, name: str, values: Any) -> None:
    """A float32 tensor behind the others."""
    raw = np.asarray(values, np.float32).tobytes()
    file.infos.append(Info(name, tuple(reversed(np.shape(values))), 0, len(file.data)))
    file.data += raw + bytes(-len(raw) % 32)


def add_tensor(path: Path, rng: Random) -> Change:
    """A tensor that changes the function (a bias, a norm of queries) is honoured or refused."""
    file = Gguf.read(path)
    name, size = rng.choice(
        [
            *(("blk.0.attn_q.bias", 64), ("blk.0.attn_k.bias", 32), ("blk.1.attn_output.bias", 64)),
            *(("blk.0.ffn_down.bias", 64), ("blk.0.attn_q_norm.weight", 16), ("output_norm.bias", 64)),
            *(("blk.0.attn_norm.bias", 64), ("output.bias", 100), ("blk.0.attn_sinks.weight", 4)),
            *(
                ("blk.0.layer_output_scale.weight", 1),
                ("blk.2.attn_norm.weight", 64),
                ("per_layer_model_proj.weight", 64),
            ),
        ]
    )
    _append(file, name, np.full(size, 0.5))
    file.write(path)
    return Change(f"{name} added", Refusal())


def add_tensor_without_effect(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    name = rng.choice(["zz", "general.x", "blk.0.attn_rot_embd", "v.patch_embd.weight", "tokenizer.x"])
    _append(file, name, np.ones(8))
    file.write(path)
    return Change(f"{name} added", SAME)


def set_counts(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    tensors, facts = len(file.infos), len(file.facts)
    count = rng.choice([0, 1, -1, 2**20, 2**31, 2**62, 2**64 - 1])
    if rng.random() < 0.5:
        file.tensor_count = count if count not in (1, -1) else tensors + count
        text = f"{file.tensor_count} tensors told, {tensors} there"
    else:
        file.fact_count = count if count not in (1, -1) else facts + count
        text = f"{file.fact_count} facts told, {facts} there"
    file.write(path)
    return Change(text, Refusal())


def set_magic_or_version(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    if rng.random() < 0.4:
        file.magic = rng.choice([b"FUGG", b"GGML", b"ggjt", b"\0\0\0\0", b"PK\3\4"])
        text, expect = f"magic {file.magic!r}", Refusal()
    else:
        file.version = rng.choice([0, 1, 2, 4, 99, 2**24, 3 << 24])
        text, expect = f"version {file.version}", SAME if file.version == 2 else Refusal()
    file.write(path)
    return Change(text, expect)


def _pick(file: Gguf, rng: Random) -> int:
    return rng.randrange(len(file.infos))


def set_tensor_type(path: Path, rng: Random) -> Change:
    """Another type over the same bytes: the data then has holes, overlaps or ends too early."""
    file = Gguf.read(path)
    index = _pick(file, rng)
    info, kind = file.infos[index], rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 14, 16, 24, 28, 30, 39, 99, 2**31])
    file.infos[index] = replace(info, kind=kind)
    file.write(path)
    expect: Expect = SAME if kind == info.kind else Anything() if {kind, info.kind} <= {1, 30} else Refusal()
    return Change(f"{info.name} of type {kind} (was {info.kind})", expect)


def set_tensor_offset(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    index = _pick(file, rng)
    info, other = file.infos[index], file.infos[_pick(file, rng)]
    offset = rng.choice([0, 1, info.offset + 32, other.offset, len(file.data), 2**40, 2**63, 2**64 - 32])
    file.infos[index] = replace(info, offset=offset)
    file.write(path)
    return Change(f"{info.name} at {offset} (was {info.offset})", SAME if offset == info.offset else Refusal())


def set_tensor_dims(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    index = _pick(file, rng)
    info = file.infos[index]
    dims = rng.choice(
        [
            *(
                (),
                (0,),
                (2**40,),
                (2**63, 2),
                info.dims[::-1],
                (*info.dims, 1),
                (*info.dims, 1, 1, 1, 1),
                (*info.dims, 2),
            ),
            *((info.dims[0] * 2, *info.dims[1:]), (info.dims[0] // 2, *info.dims[1:]), (1, *info.dims)),
        ]
    )
    file.infos[index] = replace(info, dims=dims)
    file.write(path)
    trailing = dims[: len(info.dims)] == info.dims and set(dims[len(info.dims) :]) <= {1}
    return Change(f"{info.name} has dimensions {dims} (were {info.dims})", SAME if trailing else Refusal())


def rename_tensor(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    index = _pick(file, rng)
    info = file.infos[index]
    name = rng.choice(
        ["", "x", "blk.9.attn_q.weight", info.name + ".weight", info.name.upper(), file.infos[index - 1].name]
    )
    file.infos[index] = replace(info, name=name)
    file.write(path)
    return Change(f"{info.name} renamed to {short(name)}", _unless_head(info))


def drop_tensor(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    info = file.infos.pop(_pick(file, rng))
    file.write(path)
    return Change(f"{info.name} not told", _unless_head(info))


def _unless_head(info: Info) -> Expect:
    """A file without a head is one whose embedding is the head: another, valid model."""
    return Anything() if info.name == "output.weight" else Refusal()


def set_number(path: Path, rng: Random) -> Change:
    """NaN or infinity in a float32 tensor."""
    file = Gguf.read(path)
    info = rng.choice([info for info in file.infos if info.kind == 0])
    data = bytearray(file.data)
    value = rng.choice([float("nan"), float("inf"), float("-inf")])
    data[info.offset + 8 : info.offset + 12] = struct.pack("<f", value)
    file.data = bytes(data)
    file.write(path)
    return Change(f"{value} in {info.name}", Refusal())


def cut(path: Path, rng: Random) -> Change:
    raw = path.read_bytes()
    size = rng.choice([rng.randrange(len(raw)), rng.randrange(5000), len(raw) - 1, len(raw) - 32, 0, 4, 8, 23, 24])
    path.write_bytes(raw[:size])
    return Change(f"cut at byte {size} of {len(raw)}", SAME)


def flip_bytes(path: Path, rng: Random) -> Change:
    """Random bytes in what is before the data."""
    file = Gguf.read(path)
    raw = bytearray(path.read_bytes())
    place = rng.randrange(len(raw) - len(file.data))
    raw[place : place + 4] = rng.randbytes(4) if rng.random() < 0.5 else b"\xff" * 4
    path.write_bytes(raw)
    return Change(f"4 bytes at {place} overwritten", Anything())


def append(path: Path, rng: Random) -> Change:
    path.write_bytes(path.read_bytes() + rng.randbytes(100))
    return Change("100 bytes behind the data", SAME)


MUTATORS: tuple[Mutator, ...] = (
    llama3_frequencies,
    add_tensor,
    add_tensor,
    add_tensor_without_effect,
    set_counts,
    set_magic_or_version,
    set_tensor_type,
    set_tensor_offset,
    set_tensor_dims,
    rename_tensor,
    drop_tensor,
    set_number,
    cut,
    flip_bytes,
    append,
)
