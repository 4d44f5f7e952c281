"""llama.cpp computes what the run evaluated, up to the 8 bits that it rounds inputs to; those are accounted for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader

import lowbit
from gguf_files import random_model, save
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.data.text import evaluation
from lowbit.errors import LowbitError
from lowbit.metrics.perplexity import perplexity
from tiny import save_tiny, tiny_ids, tiny_tokenizer

pytest.importorskip("llama_cpp", reason="pip install 'lowbit[llamacpp]'")
from lowbit.exporters.llamacpp import open_session, source_distance

pytestmark = pytest.mark.runtimes

FAMILIES = ["llama", "llama-odd", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3": {"layer_types": ["sliding_attention"] * 3},
    "qwen2": {"vocab_size": 128},  # its tokenizer class adds a token of its own
}
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_hidden_layers": 1,
}  # rows that K types divide
TEXT = "In 1984, Ann's 12 cats (all grey)\nran  away -- didn't they?\n\n\tYes: 3.14159 times; \"naïve\" Ωmega, 東京! "


def exported(folder: Path, family: str, scheme: str, **changes: Any) -> tuple[Path, Path]:
    """A run and its file."""
    save_tiny(folder / "model", family, **CHANGES.get(family, {}) | changes)
    tiny_tokenizer(merge=True).save_pretrained(folder / "model")
    text = str(folder / "model" / "calib.txt")
    model = str(folder / "model")
    lowbit.quantize(model, folder / "run", scheme=scheme, recipe="rtn", data=text, samples=2, length=16)
    return folder / "run", lowbit.export(folder / "run", "gguf").out


def logits(run: Path, file: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of llama.cpp, of the run, and of the run with its inputs rounded as llama.cpp rounds them."""
    ids = tiny_ids(1, 48)
    rounding = through_the_table(lowbit.load(run, target="llama.cpp"))
    with torch.no_grad(), open_session(file, 64, exact=True) as session:
        return session.logits(ids[0].tolist()), lowbit.load(run)(ids).logits[0], rounding(ids).logits[0]


def through_the_table(model: Any) -> Any:
    """The model with GELU as llama.cpp's CPU code has it: looked up in a table, float16 to float16."""
    for name, module in model.named_modules():
        if name.endswith(("act_fn", ".act")) and model.config.model_type.startswith(
            ("gemma", "gpt_neox", "starcoder2")
        ):
            module.forward = looked_up(module.forward, gate=name.endswith(".mlp.act_fn"))
    return model


def looked_up(gelu: Callable[[torch.Tensor], torch.Tensor], gate: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A GELU through the table; other than as a gate, inputs of 10 and more are passed on as they are."""

    def through(x: torch.Tensor) -> torch.Tensor:
        y = gelu(x.to(torch.float16).to(x.dtype)).to(torch.float16).to(x.dtype)
        return y if gate else torch.where(x >= 10, x, y)

    return through


def assert_explained(theirs: torch.Tensor, plain: torch.Tensor, rounding: torch.Tensor) -> None:
    """Rounded inputs are the difference: with them float32's order of sums is left, and where a value computed twice
    stands on both sides of an edge between codes, now and then a step of one input, which later tokens then see."""
    assert torch.cosine_similarity(theirs.flatten(), plain.flatten(), 0) > 0.999
    left = (theirs - rounding).abs()
    assert float(left[0].max()) < 1e-5 * float(plain.std())
    assert float(left.mean()) < 0.2 * float((theirs - plain).abs().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_llamacpp_computes_every_family(tmp_path: Path, family: str) -> None:
    # 48 tokens: six times the tiny Gemmas' windows.
    assert_explained(*logits(*exported(tmp_path, family, "w4a16g32-sym")))


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("w2a16-asym", Kind.Q2_K), ("w3a16g256-sym", Kind.Q3_K), ("w4a16-asym", Kind.Q4_K),
        ("w4a16g256-asym", Kind.Q4_K), ("w5a16-asym", Kind.Q5_K), ("w6a16-sym", Kind.Q6_K),
        ("w4a16g32-asym", Kind.Q5_0), ("w8a16g32-sym", Kind.Q8_0),
    ],
)  # fmt: skip
def test_llamacpp_computes_every_block_type(tmp_path: Path, scheme: str, kind: Kind) -> None:
    run, file = exported(tmp_path, "llama", scheme, **WIDE)
    assert {t.tensor_type for t in GGUFReader(file).tensors if t.name == "blk.0.ffn_down.weight"} == {kind}
    assert lowbit.verify(run, [file])[0].ok
    assert_explained(*logits(run, file))


def test_llamacpp_goes_on_as_the_run_does(tmp_path: Path) -> None:
    run, file = exported(tmp_path, "llama", "w4a16g32-sym")
    ids = tiny_ids(1, 12)
    model = lowbit.load(run, target="llama.cpp")
    ours = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 12:].tolist()
    with open_session(file, 64, exact=True) as session:
        assert session.greedy(ids[0].tolist(), 20) == ours


@pytest.mark.slow
def test_llamacpp_computes_smollm2(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lowbit.quantize("demo", run, scheme="w4a16g32-sym", recipe="rtn", samples=1, length=32)
    file = lowbit.export(run, "gguf").out
    (found,) = lowbit.verify(run, [file])
    assert found.ok
    assert found.logits is not None
    assert found.logits < 0.05
    plain, tokenizer = lowbit.load(run), load_tokenizer(run)
    windows = evaluation("builtin", tokenizer, 512, 1024).ids
    prompt = tokenizer("The capital of France is").input_ids
    with torch.no_grad(), open_session(file, 512, exact=True) as session:
        theirs = perplexity((w[None], session.logits(w.tolist())[None]) for w in windows)
        ours = perplexity((w[None], plain(w[None]).logits) for w in windows)
        assert session.tokenize("The capital of France is") == prompt
        said = session.greedy(prompt, 24)
        scores = plain(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    # Inputs at 8 bits cost 0.1 to 0.3% of perplexity here.
    assert abs(math.log(theirs / ours)) < 0.01
    # Each token is the simulation's own choice, or within what 8-bit inputs move logits by.
    gaps = scores.amax(-1) - scores.gather(-1, torch.tensor(said)[:, None])[:, 0]
    assert float(gaps.max()) < 0.1 * float(scores.std())


def trained(kind: str) -> Any:
    """A tokenizer over the test text, split in one of the known ways."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from lowbit.exporters.gguf_tokenizer import _PATTERNS

    special = ["<unk>", "<s>", "</s>"]
    if kind.startswith("sentencepiece"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        first_space = [normalizers.Prepend("▁")] if kind == "sentencepiece, as Llama's" else []
        tokenizer.normalizer = normalizers.Sequence([*first_space, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=340)
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
        first = {"smollm": [pre_tokenizers.Digits(individual_digits=True)], "gpt-2": []}
        patterns = {name: pattern for pattern, name in _PATTERNS.items()}
        if kind in patterns:
            first[kind] = [pre_tokenizers.Split(Regex(patterns[kind]), "isolated")]
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first[kind], byte_level]) if first[kind] else byte_level
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=400, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT.replace("Ω", "").replace("東", "")] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    "kind",
    ["gpt-2", "smollm", "qwen2", "qwen35", "llama-bpe", "sentencepiece, as Llama's", "sentencepiece, as Gemma's"],
)
def test_llamacpp_cuts_text_into_the_same_tokens(tmp_path: Path, kind: str) -> None:
    tokenizer = trained(kind)
    save_tiny(tmp_path / "model", "llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "calib.txt").write_text(TEXT * 5)
    text = str(tmp_path / "calib.txt")
    lowbit.quantize(
        str(tmp_path / "model"), tmp_path / "run", scheme="w4a16g32-sym", recipe="rtn", data=text, samples=1, length=8
    )
    file = lowbit.export(tmp_path / "run", "gguf").out
    with open_session(file, 64) as session:
        for sample in (TEXT, "</s>ab 12345", "  x\n\n  y", "a\u0301b \u0915\u0940!"):
            assert session.tokenize(sample) == tokenizer(sample, add_special_tokens=False).input_ids


def test_a_broken_file_is_one_line_with_the_reason(tmp_path: Path) -> None:
    _, file = exported(tmp_path, "llama", "w4a16g32-sym")
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(LowbitError, match=r"llama.cpp does not load .*run.gguf: .*") as caught, open_session(file):
        pass
    assert "\n" not in str(caught.value)
    assert "no reason" not in str(caught.value)


FACTORS = [1.0, 1.1, 1.5, 2.0, 3.0, 4.5, 5.0, 6.0]
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
LONG = {"rope_factors_short.weight": FACTORS, "rope_factors_long.weight": [2 * f for f in FACTORS]}
SOURCES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # family, changes of the model, keys and tensors of the file
    ("llama", {}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
    ("llama", {}, YARN | {"rope.scaling.attn_factor": 0.7}, {}),
    ("qwen2", {}, YARN, {}),
    ("llama", {}, {}, {"rope_freqs.weight": FACTORS}),
    ("llama-odd", {}, {}, {}),
    ("smollm3", {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5,
     "no_rope_layers": [1, 1, 1, 0, 1], "attention_bias": False}, {}, {}),
    # llama.cpp takes the long factors by the size of its context, 256 here, and transformers by the text's, 64.
    ("phi3", {}, {"rope.scaling.original_context_length": 300, "rope.scaling.attn_factor": 1.2}, LONG),
    ("phi3", {}, {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.2}, LONG),
    ("phi3-partial", {}, {}, {}),
    ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, {}, {}),
    ("gemma3", {"layer_types": ["sliding_attention"] * 3}, {"rope.freq_base_swa": 500.0}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "keys", "tensors"), SOURCES)
def test_a_file_that_is_read_computes_what_llamacpp_computes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, Any],
    keys: dict[str, Any],
    tensors: dict[str, Any],
) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    model = random_model(family, **changes)
    file = save(tmp_path / "m.gguf", model, keys | {".tokenizer.ggml.model": "no_vocab"}, tensors)
    assert source_distance(file, tiny_ids(1, 64)[0].tolist()) < 1e-3
