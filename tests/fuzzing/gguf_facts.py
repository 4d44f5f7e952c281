"""Mutations of a ``.gguf`` file's metadata.

What changes the function must be honoured or refused; what does not must change nothing.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from fuzzing.change import SAME, Anything, Change, Expect, Mutator, Patched, Random, Refusal, short
from fuzzing.gguf_bytes import ARRAY, BOOL, FLOAT32, INT32, PACKED, STRING, UINT32, UINT64, Fact, Gguf

HEAD_DIM = 16  # of the unmutated files
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
    if fact.kind == STRING:
        return short(fact.raw[8:].decode())
    return short(fact.number) if fact.kind in PACKED else short(fact.raw)


def set_general(path: Path, rng: Random) -> Change:
    file = Gguf.read(path)
    key = rng.choice(list(GENERAL))
    fact = rng.choice(GENERAL[key])
    file.put(key, fact)
    file.write(path)
    return Change(f"{key} = {_told(fact)}", SAME)


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
    numbers = ("epsilon", "freq_base", "softcapping", "context_length", "sliding_window")
    loose = key.endswith(numbers) and value in (1.5, 1, 2**31, 0)
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


MUTATORS: tuple[Mutator, ...] = (
    *(honour,) * 10,
    *(set_general,) * 5,
    drop_fact,
    drop_fact,
    retype_fact,
    retype_fact,
    widen_fact,
    repeat_fact,
    break_fact,
    break_fact,
    set_architecture,
)
