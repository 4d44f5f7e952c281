"""Mutations of a ``.gguf`` file: its metadata, what it says of tensors, its bytes."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.change import SAME, Anything, Change, Expect, Mutator, Patched, Random, Refusal, short
from fuzzing.gguf_bytes import ARRAY, BOOL, FLOAT32, INT32, PACKED, STRING, UINT32, UINT64, Fact, Gguf, Info

WINDOW, HEAD_DIM, LAYERS = 8, 16, 2  # of the unmutated files
ROPE = {"rope_theta": 10000.0}
# Facts that a reader honours as the config says, or refuses; of both architectures unless named.
HONOURED: tuple[tuple[str, dict[str, Fact], Expect], ...] = (
    (
        "",
        {"rope.freq_base": Fact.of(500.0)},
        Patched({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ),
    ("", {"attention.layer_norm_rms_epsilon": Fact.of(0.5)}, Patched({"rms_norm_eps": 0.5})),
    ("", {"context_length": Fact.of(64)}, Patched({"max_position_embeddings": 64})),
    (
        "",
        {"rope.scaling.type": Fact.of("linear"), "rope.scaling.factor": Fact.of(4.0)},
        Patched({"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}}),
    ),
    (
        "",
        {"rope.scale_linear": Fact.of(4.0)},
        Patched({"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}}),
    ),
    (
        "",
        {
            "rope.scaling.type": Fact.of("yarn"),
            "rope.scaling.factor": Fact.of(4.0),
            "rope.scaling.original_context_length": Fact.of(32),
        },
        Patched(
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    **ROPE,
                }
            }
        ),
    ),
    ("", {"rope.scaling.type": Fact.of("none")}, SAME),
    ("", {"rope.scaling.type": Fact.of("none"), "rope.scaling.factor": Fact.of(4.0)}, SAME),
    ("", {"rope.scaling.type": Fact.of("linear"), "rope.scaling.factor": Fact.of(1.0)}, SAME),
    ("", {"rope.scaling.type": Fact.of("longrope"), "rope.scaling.factor": Fact.of(4.0)}, Refusal()),
    ("", {"rope.scaling.type": Fact.of("x"), "rope.scaling.factor": Fact.of(4.0)}, Refusal()),
    ("", {"rope.dimension_count": Fact.of(8)}, Refusal()),
    ("", {"rope.dimension_sections": Fact.of([4, 2, 2, 0])}, SAME),  # for pictures: text has equal positions in all
    ("llama", {"attention.scale": Fact.of(0.5)}, Refusal()),
    ("gemma2", {"attention.scale": Fact.of(0.5)}, Patched({"query_pre_attn_scalar": 4})),
    ("", {"attention.scale": Fact.of(HEAD_DIM**-0.5)}, SAME),
    ("llama", {"attention.key_length": Fact.of(HEAD_DIM)}, SAME),
    ("", {"attention.value_length": Fact.of(HEAD_DIM)}, SAME),
    ("", {"attention.key_length": Fact.of(8)}, Refusal()),
    ("", {"attention.value_length": Fact.of(8)}, Refusal()),
    ("gemma2", {"attn_logit_softcapping": Fact.of(2.0)}, Patched({"attn_logit_softcapping": 2.0})),
    ("gemma2", {"final_logit_softcapping": Fact.of(2.0)}, Patched({"final_logit_softcapping": 2.0})),
    ("gemma2", {"attention.sliding_window": Fact.of(4)}, Patched({"sliding_window": 4})),
    ("llama", {"logit_scale": Fact.of(0.5)}, Refusal()),
    ("llama", {"embedding_scale": Fact.of(2.0)}, Refusal()),
    ("llama", {"residual_scale": Fact.of(0.5)}, Refusal()),
    ("llama", {"attention.clamp_kqv": Fact.of(1.0)}, Refusal()),
    ("llama", {"attention.max_alibi_bias": Fact.of(8.0)}, Refusal()),
    ("llama", {"attention.causal": Fact.of(False)}, Refusal()),
    ("llama", {"use_parallel_residual": Fact.of(True)}, Refusal()),
    ("llama", {"expert_count": Fact.of(8), "expert_used_count": Fact.of(2)}, Refusal()),
    ("", {"expert_count": Fact.of(0)}, SAME),
    ("", {"attention.head_count_kv": Fact.of([2, 2])}, SAME),
    ("", {"attention.head_count_kv": Fact.of([2, 1])}, Refusal()),
    ("", {"attention.head_count": Fact.of([4, 4])}, SAME),
    ("", {"feed_forward_length": Fact.of([96, 96])}, SAME),
    ("", {"feed_forward_length": Fact.of([96, 48])}, Refusal()),
    ("", {"attention.head_count_kv": Fact.of(4)}, Refusal()),
    ("", {"attention.head_count": Fact.of(2)}, Refusal()),
    ("", {"attention.head_count": Fact.of(8)}, Refusal()),
    ("", {"attention.head_count": Fact.of(0)}, Refusal()),
    ("", {"embedding_length": Fact.of(32)}, Refusal()),
    ("", {"feed_forward_length": Fact.of(48)}, Refusal()),
    ("llama", {"block_count": Fact.of(1)}, Patched({"num_hidden_layers": 1})),
    ("", {"block_count": Fact.of(3)}, Refusal()),
    ("", {"block_count": Fact.of(0)}, Refusal()),
    ("", {"block_count": Fact.of(2**31)}, Refusal()),
    ("", {"block_count": Fact.of(2**63, UINT64)}, Refusal()),
    ("", {"vocab_size": Fact.of(100)}, SAME),
    ("", {"vocab_size": Fact.of(99)}, Refusal()),
    ("", {"vocab_size": Fact.of(2**40, UINT64)}, Refusal()),
    ("", {"embedding_length": Fact.of(2**40, UINT64)}, Refusal()),
    ("", {"feed_forward_length": Fact.of(2**31)}, Refusal()),
    ("", {"attention.head_count": Fact.of(2**31)}, Refusal()),
)
GENERAL: dict[str, tuple[Fact, ...]] = {
    "general.alignment": tuple(Fact.of(n) for n in (0, 1, 7, 16, 32, 64, 2**31)),
    "general.quantization_version": (Fact.of(2), Fact.of(99), Fact.of("x")),
    "general.file_type": (Fact.of(2), Fact.of(2**31)),
    "general.type": (Fact.of("model"), Fact.of("adapter"), Fact.of("mmproj")),
    "general.basename": (Fact.of("x" * 10**5), Fact.of("a\nb")),
    "split.count": (Fact.of(1), Fact.of(2), Fact.of("x"), Fact.of([2])),
    "split.no": (Fact.of(0), Fact.of(1)),
    "adapter.type": (Fact.of("lora"),),
    "tokenizer.ggml.model": tuple(Fact.of(s) for s in ("llama", "bert", "x", "", "no_vocab", "none", "t5", "rwkv")),
    "tokenizer.ggml.pre": (Fact.of("llama-bpe"), Fact.of("x")),
    "tokenizer.ggml.tokens": (Fact.of([]), Fact.of(["a"]), Fact.of([1, 2]), Fact.of("x")),
    "tokenizer.ggml.token_type": (Fact.of([1]), Fact.of(["x"]), Fact.of([99] * 100)),
    "tokenizer.ggml.scores": (Fact.of([1.0]), Fact.of([float("nan")] * 100)),
    "tokenizer.ggml.merges": (Fact.of(["x"]), Fact.of(["a b c"]), Fact.of([1]), Fact.of(["q zz"])),
    "tokenizer.ggml.bos_token_id": (Fact.of(200), Fact.of(2**31), Fact.of("x"), Fact.of(-1, INT32)),
    "tokenizer.ggml.eos_token_id": (Fact.of(200), Fact.of(2**31), Fact.of([1]), Fact.of(-1, INT32)),
    "tokenizer.ggml.add_bos_token": (Fact.of(True), Fact.of("x")),
    "tokenizer.ggml.unknown_token_id": (Fact.of(0), Fact.of(2**31)),
    "tokenizer.ggml.padding_token_id": (Fact.of(0), Fact.of(2**31)),
    "tokenizer.chat_template": (Fact.of("{% for"), Fact.of(7), Fact.of("")),
    "tokenizer.ggml.added_tokens": (Fact.of(["a"]),),
}
# A metadata key of another kind than it should be; read as the same value or refused.
TYPED = ("x", "", -1, 1.5, True, [], [1], ["x"], float("nan"), 2**31, 0)


def _fact(value: Any) -> Fact:
    return Fact.of(value, INT32) if isinstance(value, int) and value < 0 else Fact.of(value)


def honour(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    _, facts, expect = rng.choice([case for case in HONOURED if case[0] in ("", file.architecture)])
    for key, fact in facts.items():
        file.put(f"{file.architecture}.{key}", fact)
    file.write(path)
    return Change(", ".join(f"{key} = {_told(fact)}" for key, fact in facts.items()), expect)


def _told(fact: Fact) -> str:
    return short(fact.number) if fact.kind in PACKED else short(fact.raw)


def set_general(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    key = rng.choice(list(GENERAL))
    fact = rng.choice(GENERAL[key])
    file.put(key, fact)
    file.write(path)
    return Change(f"{key} = {_told(fact)}", SAME)


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


def drop_fact(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    key, fact = rng.choice(file.facts)
    file.facts.remove((key, fact))
    file.write(path)
    # The window that llama.cpp takes where the file has none.
    return Change(f"{key} dropped", Patched({"sliding_window": 4096}) if key.endswith("sliding_window") else SAME)


def retype_fact(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    own = [key for key, _ in file.facts if key.startswith(file.architecture)]
    key, value = rng.choice(own), rng.choice(TYPED)
    file.put(key, _fact(value))
    file.write(path)
    # Numbers that are allowed there are numbers that change the function: they are tried by ``honour``.
    loose = key.endswith(("epsilon", "freq_base", "context_length", "sliding_window")) and value in (1.5, 1, 2**31, 0)
    return Change(f"{key} = {short(value)}", Anything() if loose else SAME)


def widen_fact(path: Path, rng: Random) -> Change:
    """The same number in another of the format's types."""
    file = Gguf.read(path)
    key, fact = rng.choice([(k, f) for k, f in file.facts if f.kind in (UINT32, FLOAT32)])
    kind = rng.choice([5, 10, 11] if fact.kind == UINT32 else [12])
    file.put(key, Fact.of(fact.number, kind))
    file.write(path)
    return Change(f"{key} as type {kind}", SAME)


def repeat_fact(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    key, fact = rng.choice([(k, f) for k, f in file.facts if f.kind == UINT32])
    file.facts.append((key, Fact.of(fact.number + 1)))
    file.write(path)
    return Change(f"{key} twice", SAME)


def break_fact(path: Path, rng: Random) -> Change:
    """An unknown type, an array or a string of an impossible length, arrays in arrays."""
    file = Gguf.read(path)
    key = rng.choice([key for key, _ in file.facts])
    huge = rng.choice([2**31, 2**40, 2**63, 2**64 - 1])
    text, fact = rng.choice(
        [
            ("of type 13", Fact(13, b"\0" * 4)),
            ("of type 255", Fact(255, b"\0" * 4)),
            (f"an array of {huge} bytes", Fact(ARRAY, struct.pack("<IQ", 0, huge))),
            (f"an array of {huge} strings", Fact(ARRAY, struct.pack("<IQ", STRING, huge))),
            ("an array of type 99", Fact(ARRAY, struct.pack("<IQ", 99, 3))),
            ("an array of arrays", Fact(ARRAY, struct.pack("<IQ", ARRAY, 2**20))),
            ("arrays 5000 deep", Fact(ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000 + struct.pack("<IQ", 0, 0))),
            (f"a string of {huge} bytes", Fact(STRING, struct.pack("<Q", huge))),
            ("no UTF-8", Fact(STRING, struct.pack("<Q", 2) + b"\xff\xfe")),
            ("a bool of 7", Fact(BOOL, b"\7")),
        ]
    )
    file.put(key, fact)
    file.write(path)
    return Change(f"{key} is {text}", SAME)


def set_architecture(path: Path, rng: Random) -> Change:
    """The name of another architecture, over the keys of this one or with the keys renamed."""
    file = Gguf.read(path)
    old, new = (
        file.architecture,
        rng.choice(["llama", "gemma2", "qwen2", "phi3", "mistral", "bert", "clip", "t5", "x", ""]),
    )
    renamed = rng.random() < 0.5
    if renamed:
        file.facts = [(key.replace(f"{old}.", f"{new}.", 1), fact) for key, fact in file.facts]
    file.put("general.architecture", Fact.of(new))
    file.write(path)
    same = new == old or (renamed and {new, old} == {"llama", "mistral"})
    return Change(f"architecture {new}, keys {'renamed' if renamed else 'as they were'}", SAME if same else Refusal())


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
    *(honour,) * 10,
    *(set_general,) * 5,
    llama3_frequencies,
    add_tensor,
    add_tensor,
    add_tensor_without_effect,
    drop_fact,
    drop_fact,
    retype_fact,
    retype_fact,
    widen_fact,
    repeat_fact,
    break_fact,
    break_fact,
    set_architecture,
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
