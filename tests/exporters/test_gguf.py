"""A GGUF file holds the run's own codes and qparams, and verify sees any byte that does not."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.gguf_reader import convert
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.exporters.gguf_blocks import block_type, pack_blocks
from lowbit.exporters.gguf_model import unlike_llamacpp
from lowbit.exporters.gguf_tokenizer import tokenizer_metadata
from lowbit.quant.format import QParams, QTensor
from lowbit.quant.integer import IntFormat
from tiny import CONFIGS, save_tiny, tiny_ids, tiny_tokenizer

CHANGES: dict[str, dict[str, Any]] = {
    "gemma3": {"layer_types": ["sliding_attention"] * 3},
    "qwen2": {"vocab_size": 128},  # its tokenizer class adds a token of its own
}


def make(folder: Path, family: str, scheme: str = "w4a16g32-sym", changes: Any = None, **more: Any) -> Path:
    save_tiny(folder / "model", family, **CHANGES.get(family, {}) | (changes or {}))
    tiny_tokenizer(merge=True).save_pretrained(folder / "model")
    text = str(folder / "model" / "calib.txt")
    lowbit.quantize(
        str(folder / "model"), folder / "run", scheme=scheme, recipe="rtn", data=text, samples=2, length=16, **more
    )
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("gguf"), "llama")


# Both kinds of blocks; which family has which does not matter.
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma3"), "w4a16g32-sym"),
    **dict.fromkeys(("llama-odd", "qwen2", "gemma2"), "w4a16-asym"),
}


@pytest.mark.parametrize(("family", "scheme"), [*FAMILIES.items(), ("llama", "w4a16-asym")])
def test_every_family_reads_back_bit_for_bit(tmp_path: Path, family: str, scheme: str) -> None:
    run = make(tmp_path, family, scheme)
    made = lowbit.export(run, "gguf")
    (found,) = lowbit.verify(run, [made.out])
    assert found.ok
    assert found.exact == found.tensors > 20
    kinds = {t.tensor_type for t in gguf.GGUFReader(made.out).tensors if "ffn_up.weight" in t.name}
    assert kinds == {Kind.Q4_0 if scheme.endswith("-sym") else Kind.Q5_0}


@pytest.mark.parametrize("family", ["llama", "llama-odd", "qwen2"])
def test_transformers_own_loader_computes_the_same(tmp_path: Path, family: str) -> None:
    run = make(tmp_path, family)
    made = lowbit.export(run, "llama.cpp")
    # GGUF has no key that says that a llama has biases: llama.cpp takes them where the tensors are there, that loader
    # builds a model without them and drops the tensors unless it is told.
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama-odd" else {}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=made.out.name, dtype=torch.float32, **biases)
    ids = tiny_ids(1)
    with torch.no_grad():
        ours, got = lowbit.load(run)(ids).logits, theirs(ids).logits
    assert torch.equal(got, ours)


FACTORS = [1.0, 1.1, 1.5, 2.0, 3.0, 4.5, 5.0, 6.0]
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"factor": 4.0}),
    "yarn": ("qwen3", {"factor": 4.0, "original_max_position_embeddings": 32}),
    "yarn, attention": ("qwen2", {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.7}),
    "yarn, mscale": (
        "llama",
        {"factor": 4.0, "original_max_position_embeddings": 32, "mscale": 2.0, "mscale_all_dim": 0.5},
    ),
    "llama3": (
        "mistral",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "longrope": (
        "llama",
        {"short_factor": FACTORS, "long_factor": [2 * f for f in FACTORS], "original_max_position_embeddings": 32},
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_rotary_embeddings_come_back(tmp_path: Path, case: str) -> None:
    family, rope = ROPES[case]
    parameters = {"rope_type": case.partition(",")[0], "rope_theta": 1e4, **rope}
    comes_back(tmp_path, family, {"rope_parameters": parameters})


def test_scaled_gemma3_comes_back(tmp_path: Path) -> None:
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    changes = {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        "final_logit_softcapping": 2.0,
    }
    comes_back(tmp_path, "gemma3", changes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama-odd", {}), ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0})],
)
def test_what_is_special_of_a_family_comes_back(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    comes_back(tmp_path, family, changes)


def comes_back(folder: Path, family: str, changes: dict[str, Any]) -> None:
    """An exported run, read as any ``.gguf`` file is, has the run's logits; without its rope it has not."""
    run = make(folder / "changed", family, changes=changes)
    made = lowbit.export(run, "gguf")
    assert lowbit.verify(run, [made.out])[0].ok
    (folder / "back").mkdir()
    convert(made.out, folder / "back")
    ids = tiny_ids(1, 90)
    with torch.no_grad():
        right = lowbit.load(run)(ids).logits
        got = AutoModelForCausalLM.from_pretrained(folder / "back")(ids).logits
        plain = {"rope_type": "default", "rope_theta": 1e4}
        plain = plain if family != "gemma3" else {"full_attention": plain, "sliding_attention": plain}
        other = AutoModelForCausalLM.from_pretrained(folder / "back", rope_parameters=plain)(ids).logits
    assert (got - right).norm() < 1e-5 * right.norm()
    assert "rope_parameters" not in changes or (other - right).norm() > 1e-3 * right.norm()


def test_transformers_own_loader_reads_gemmas_tensors(tmp_path: Path) -> None:
    # Tensors, not logits: that loader does not read query_pre_attn_scalar, and takes 256 for it.
    run = make(tmp_path, "gemma2")
    made = lowbit.export(run, "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=made.out.name, dtype=torch.float32)
    expected = lowbit.load(run).state_dict()
    for name, value in theirs.state_dict().items():
        # Gains come back as (1 + w) - 1: off by at most half a step of a float32 below 4, 2**-23.
        slack = 2.0**-22 if "norm" in name else 0.0
        assert float((value - expected[name]).abs().max()) <= slack, name


@pytest.mark.parametrize(
    ("bits", "symmetric", "size", "kind"),
    [
        (2, True, 32, Kind.Q4_0), (3, False, 64, Kind.Q4_0), (4, True, None, Kind.Q4_0), (4, False, 32, Kind.Q5_0),
        (5, True, 64, Kind.Q5_0), (7, False, 128, Kind.Q8_0), (8, True, 32, Kind.Q8_0), (2, True, 256, Kind.Q2_K),
        (2, False, None, Kind.Q2_K), (3, True, 256, Kind.Q3_K), (3, False, 256, Kind.Q4_0), (4, True, 512, Kind.Q4_0),
        (4, False, 256, Kind.Q4_K), (5, True, None, Kind.Q5_0), (5, False, 256, Kind.Q5_K), (6, True, 256, Kind.Q6_K),
        (6, False, 256, Kind.Q8_0),
    ],
)  # fmt: skip
def test_blocks_hold_codes_and_qparams(bits: int, symmetric: bool, size: int | None, kind: Kind) -> None:
    # Every code and every zero that the format has, not only those that some weight leads to.
    format = IntFormat(bits, size, symmetric)
    draw = torch.Generator().manual_seed(bits)
    scale = format.qparams(torch.randn(40, 512, generator=draw)).scale
    codes = torch.randint(0, format.levels + 1, (40, 512), generator=draw, dtype=torch.uint8)
    zero = torch.randint(0, format.levels + 1, scale.shape, generator=draw).float()
    q = QTensor(codes, QParams(scale, torch.full_like(scale, 2.0 ** (bits - 1)) if symmetric else zero), format)
    assert block_type(format, 512) == kind
    back = dequantize(pack_blocks(q, kind), kind)
    assert np.array_equal(back.view(np.int32), q.dequantize().numpy().view(np.int32))


def test_golden_bytes() -> None:
    # Codes 0 .. 15 twice, scale 0.5 = 0x3800: low half is code j, high half code j + 16.
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    q = QTensor(codes, QParams(torch.tensor([[0.5]]), torch.tensor([[8.0]])), IntFormat(4))
    pairs = bytes(17 * j for j in range(16))
    assert pack_blocks(q, Kind.Q4_0).tobytes() == b"\x00\x38" + pairs
    # n = code - 8, stored + 16 = code + 8: 8 .. 15 without the fifth bit, 16 .. 23 with it.
    low = bytes(17 * ((j + 8) % 16) for j in range(16))
    assert pack_blocks(q, Kind.Q5_0).tobytes() == b"\x00\x38" + b"\x00\xff\x00\xff" + low
    assert pack_blocks(q, Kind.Q8_0).tobytes() == b"\x00\x38" + bytes((c % 16 - 8) % 256 for c in range(32))


def test_golden_bytes_of_k_types() -> None:
    # Code i // 16 everywhere: value i of a half and value i + 32 differ by 2.
    codes = torch.arange(256, dtype=torch.uint8)[None] // 16
    q = QTensor(codes, QParams(torch.tensor([[0.5]]), torch.tensor([[9.0]])), IntFormat(4, 256, False))
    subs = b"\x01" * 4 + b"\x09" * 4 + b"\x91" * 4  # scales 1 and zeros 9: four, four, low nibbles of the other four
    pairs = b"".join(bytes([(4 * j + 2 + h) << 4 | 4 * j + h]) * 16 for j in range(4) for h in range(2))
    assert pack_blocks(q, Kind.Q4_K).tobytes() == b"\x00\x38\x00\x38" + subs + pairs
    q = QTensor(codes % 4, QParams(torch.tensor([[0.5]]), torch.tensor([[3.0]])), IntFormat(2, 256, False))
    # Planes 32 apart: codes 0, 2, 0, 2 for the first 16 bytes of a half, 1, 3, 1, 3 for the others.
    planes = (b"\x88" * 16 + b"\xdd" * 16) * 2
    assert pack_blocks(q, Kind.Q2_K).tobytes() == b"\x31" * 16 + planes + b"\x00\x38\x00\x38"


@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "blk.2.ffn_down.weight", "output_norm.weight"])
@pytest.mark.parametrize("offset", [0, 7])  # of a block: in the scale, in the codes
def test_one_wrong_byte_is_named(run: Path, tmp_path: Path, name: str, offset: int) -> None:
    made = lowbit.export(run, "gguf", out=tmp_path / "m.gguf")
    (at,) = (t.data_offset for t in gguf.GGUFReader(made.out).tensors if t.name == name)
    content = bytearray(made.out.read_bytes())
    content[at + offset] ^= 0x10
    made.out.write_bytes(content)
    (found,) = lowbit.verify(run, [made.out])
    parts = {"blk.1.attn_k.weight": "k_proj", "blk.2.ffn_down.weight": "down_proj", "output_norm.weight": "norm"}
    assert len(found.differs) == 1
    assert parts[name] in found.differs[0]
    assert found.max_difference > 0
    assert call(["verify", str(run), str(made.out)]) == 1


def test_a_wrong_piece_and_a_cut_file_are_seen(run: Path, tmp_path: Path) -> None:
    made = lowbit.export(run, "gguf", out=tmp_path / "m.gguf")
    content = made.out.read_bytes()
    made.out.write_bytes(content.replace(b"</s>", b"</t>", 1))
    assert lowbit.verify(run, [made.out])[0].other == ["tokenizer.ggml.tokens"]
    made.out.write_bytes(content[:-3000])
    assert lowbit.verify(run, [made.out])[0].unreadable


def test_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.gguf"
    assert call(["export", str(run), "--to", "gguf", "--out", str(out)]) == 0
    capsys.readouterr()
    assert call(["verify", str(run), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["ok"] is True


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w4a4", r"w4a4, act: .*nearest that fits: w4a16-asym$"),
        ("w4a16kv8", r"kv: .*nearest that fits: w4a16-sym$"),
        ("w8a16-asym", r"weight: .*free zero.*nearest that fits: w8a16-sym$"),
        ("w4a16g16-sym", r"weight: .*groups of 16.*nearest that fits: w4a16g32-sym$"),
    ],
)
def test_what_does_not_fit_is_refused(refusal_of: Callable[..., str], scheme: str, message: str) -> None:
    assert re.search(message, refusal_of("gguf", scheme))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"tie_word_embeddings": False}, "gemma2 uses the embedding"),
        ("qwen2", {"head_dim": 24}, "qwen2 takes hidden_size / num_attention_heads"),
        ("qwen3", {"attention_bias": True}, "no attention biases"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "llama.cpp assumes 16"),
        ("mistral", {"sliding_window": 8}, "has none"),
        ("llama", {"hidden_act": "gelu"}, "computes silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_parameters.rope_type 'dynamic'",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "beta_fast": 8.0}}, "rope_parameters.beta_fast 8.0"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "truncate": False}}, "rope_parameters.truncate False"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type 'llama3'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor 0.5",
        ),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping None"),
    ],
)
def test_what_llamacpps_graph_does_not_do_is_named(family: str, changes: dict[str, Any], message: str) -> None:
    config = CONFIGS[family]()
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    for key, value in (CHANGES.get(family, {}) | changes).items():
        setattr(config, key, value)
    assert message in (unlike_llamacpp(config) or "")


def test_llamacpp_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    monkeypatch.delitem(sys.modules, "lowbit.exporters.llamacpp", raising=False)
    with pytest.raises(LowbitError, match=r"llama-cpp-python.*pip install 'lowbit\[llamacpp\]'$"):
        importlib.import_module("lowbit.exporters.llamacpp")


def test_wrong_places_are_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.gguf").write_text("x")
    (tmp_path / "half" / ".run").mkdir(parents=True)
    (tmp_path / "half" / ".run" / "identity.json").write_text("{}")
    before = sorted(tmp_path.iterdir())
    for folder, to, out, message in [
        (tmp_path / "empty", "gguf", None, "not a run folder"),
        (tmp_path / "half", "gguf", None, "holds an unfinished run"),
        (run, "ggfu", None, "did you mean 'gguf'"),
        (run, "gguf", tmp_path / "there.gguf", "exists"),
        (run, "gguf", tmp_path / "x.bin", "ends in .gguf"),
    ]:
        with pytest.raises(LowbitError, match=message) as caught:
            lowbit.export(folder, to, out=out)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_tokens_beyond_the_embedding_are_left_out_with_a_warning(tmp_path: Path) -> None:
    """Text models of Gemma 3 keep their family's token of images, whose id is the number of embeddings."""
    tokenizer = tiny_tokenizer(merge=True)
    size = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(tmp_path)
    found, warnings = tokenizer_metadata(tmp_path, size)
    assert len(found["tokenizer.ggml.tokens"]) == size
    assert "<image>" not in found["tokenizer.ggml.tokens"]
    assert any("no embedding for <image>" in warning for warning in warnings)
    assert tokenizer_metadata(tmp_path, size + 1)[0]["tokenizer.ggml.tokens"][-1] == "<image>"
    with pytest.raises(LowbitError, match=r"the tokenizer in .* has id"):
        tokenizer_metadata(tmp_path, size - 10)
