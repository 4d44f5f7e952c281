"""Mutations of what a tokenizer is loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuzzing.change import Change, Mutator, Random, short
from fuzzing.json_files import load, of_text, of_tree, store

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATES = (
    "{% for m in messages %}",
    "{{ 1/0 }}",
    "{{ messages[0].x.y }}",
    "{% import 'os' %}",
    "",
    "{" * 5000,
    "ok",
)
SETTING: dict[str, tuple[Any, ...]] = {
    "add_bos_token": (True, "x", None),
    "add_eos_token": (True, "x"),
    "add_prefix_space": (True, "x"),
    "added_tokens_decoder": (
        {"96": {"content": "zz", "special": True}},
        {"1000000": {"content": "a", "special": False}},
        {"x": {"content": "a"}},
        {"-1": {"content": "a"}},
        {"3": {}},
        {"3": "x"},
        [],
        "x",
    ),
    "additional_special_tokens": (["<x>"], [1], "x", [None]),
    "auto_map": ({"AutoTokenizer": ["evil.Tok", None]}, {"AutoTokenizer": "evil.Tok"}, "x", []),
    "backend": ("sentencepiece", "mistral", "x", 3, None),
    "bos_token": (None, 3, "zzz", {"content": "<s>", "__type": "AddedToken"}, {"x": 1}, [], ""),
    "chat_template": (*TEMPLATES, 3, [], [{"name": "default", "template": "x"}], [{"x": 1}], {"default": "x"}, {}),
    "clean_up_tokenization_spaces": ("x", True),
    "eos_token": (None, 3, "zzz", {"content": "</s>", "__type": "AddedToken"}, [], ""),
    "extra_special_tokens": (["<x>"], {"x_token": "<x>"}, [1], "x", {"x": 3}),
    "fix_mistral_regex": (True, "x"),
    "is_local": (True, "x"),
    "legacy": (True, "x"),
    "local_files_only": (False, "x"),
    "model_input_names": (["input_ids"], [], "x", 3, ["x"]),
    "model_max_length": (1, 0, -1, "x", None, 5, float("nan"), float("inf"), 1e30, 10**40),
    "model_specific_special_tokens": ({"x": "y"}, "x"),
    "name_or_path": ("/etc", 3),
    "pad_token": (None, 3, "zzz", ""),
    "padding_side": ("left", "x", 3),
    "processor_class": ("x", 3),
    "sp_model_kwargs": ({}, "x"),
    "special_tokens_map_file": ("/etc/passwd", 3),
    "split_special_tokens": (True, "x"),
    "tokenizer_class": (
        *(
            "LlamaTokenizer",
            "LlamaTokenizerFast",
            "GPT2Tokenizer",
            "GPT2TokenizerFast",
            "GemmaTokenizer",
            "T5Tokenizer",
        ),
        *(
            "Qwen2Tokenizer",
            "BertTokenizer",
            "PreTrainedTokenizerFast",
            "PreTrainedTokenizer",
            "x",
            "",
            "os",
            None,
            3,
        ),
        *(["x"], {}, "ByT5Tokenizer", "WhisperTokenizer", "BertJapaneseTokenizer", "TokenizersBackend"),
    ),
    "tokenizer_file": ("/etc/passwd", "../x", 3),
    "truncation_side": ("left", "x"),
    "unk_token": (None, 3, "zzz"),
    "use_default_system_prompt": (True, "x"),
    "use_fast": (False, "x"),
    "vocab_file": ("/etc/passwd", 3),
}
TOKENS: tuple[tuple[str, Any], ...] = (
    ("truncation", {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
    ("truncation", {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 9}),
    ("truncation", "x"),
    (
        "padding",
        {
            "strategy": {"Fixed": 64},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    ),
    ("normalizer", {"type": "Lowercase"}),
    ("normalizer", {"type": "Prepend", "prepend": "!"}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("normalizer", {"type": "x"}),
    ("pre_tokenizer", None),
    ("pre_tokenizer", {"type": "Whitespace"}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}),
    ("pre_tokenizer", {"type": "x"}),
    ("decoder", None),
    ("decoder", {"type": "x"}),
    ("post_processor", None),
    ("post_processor", {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}),
    ("post_processor", {"type": "BertProcessing", "sep": ["</s>", 200], "cls": ["<s>", 100]}),
    ("post_processor", {"type": "x"}),
    ("version", "9.9"),
    ("version", 1),
)
FILES: tuple[tuple[str, str], ...] = (
    ("special_tokens_map.json", "{"),
    ("special_tokens_map.json", "[]"),
    ("special_tokens_map.json", '{"bos_token": 3}'),
    ("special_tokens_map.json", '{"bos_token": "zzz"}'),
    ("special_tokens_map.json", '{"bos_token": {"content": 3}}'),
    ("added_tokens.json", '{"zz": 96}'),
    ("added_tokens.json", '{"zz": "x"}'),
    ("added_tokens.json", "[]"),
    ("added_tokens.json", "{"),
    ("vocab.json", "{"),
    ("vocab.json", '{"a": 0}'),
    ("merges.txt", "a b\n"),
    ("merges.txt", "abc"),
    ("tokenizer.model", "x"),
    ("tekken.json", "{}"),
    ("chat_template.jinja", "{% for"),
    ("chat_template.json", "{"),
    ("chat_template.json", '{"chat_template": 3}'),
    ("preprocessor_config.json", "{"),
    ("processor_config.json", "{"),
    ("adapter_config.json", "{"),
    ("adapter_config.json", '{"base_model_name_or_path": "x/y"}'),
    ("lowbit.json", "{"),
    ("lowbit.json", "{}"),
    ("lowbit.json", "[]"),
    ("tokenization_x.py", "raise SystemExit(3)"),
)


def set_setting(folder: Path, rng: Random) -> Change:
    key = rng.choice(list(SETTING))
    value = rng.choice(SETTING[key])
    store(folder / SETTINGS, load(folder / SETTINGS) | {key: value})
    return Change(f"tokenizer_config {key} = {short(value)}")


def set_part(folder: Path, rng: Random) -> Change:
    key, value = rng.choice(TOKENS)
    store(folder / TOKENIZER, load(folder / TOKENIZER) | {key: value})
    return Change(f"tokenizer {key} = {short(value)}")


def set_post_processor(folder: Path, rng: Random) -> Change:
    """A template that puts BOS before the text, whose id is right, beyond the model, or not told."""
    ids = rng.choice([[1], [200], [2**31], [-1], [], [2**40], ["x"], [1, 2]])
    known = {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}} if rng.random() < 0.8 else {}
    text = {"Sequence": {"id": rng.choice(["A", "A", "B", "C"]), "type_id": 0}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, text]
    content = load(folder / TOKENIZER)
    content["post_processor"] |= {"single": single, "special_tokens": known}
    store(folder / TOKENIZER, content)
    return Change(f"tokenizer's template has BOS with the ids {ids} ({'known' if known else 'unknown'})")


def set_id(folder: Path, rng: Random) -> Change:
    """A token of the text has an id that is taken, beyond the model, or impossible."""
    content = load(folder / TOKENIZER)
    token, new = (
        rng.choice(["a", "b", "!", "<s>"]),
        rng.choice([0, 5, 96, 10**6, 2**31, 2**32, 2**40, -1, "x", None, 1.5]),
    )
    content["model"]["vocab"][token] = new
    store(folder / TOKENIZER, content)
    return Change(f"tokenizer: id of {token} = {new}")


def drop_token(folder: Path, rng: Random) -> Change:
    content = load(folder / TOKENIZER)
    token = rng.choice(list(content["model"]["vocab"]))
    del content["model"]["vocab"][token]
    store(folder / TOKENIZER, content)
    return Change(f"tokenizer without the token {short(token)}")


def add_token(folder: Path, rng: Random) -> Change:
    content = load(folder / TOKENIZER)
    token, number = rng.choice(["a", "ab", "zzz", "", "\n"]), rng.choice([96, 95, 1000, 2**31, 2**32, -1, "x", None])
    fields = ("single_word", "lstrip", "rstrip", "normalized")
    entry = {"id": number, "content": token, "special": rng.random() < 0.5} | dict.fromkeys(fields, False)
    content["added_tokens"].append(entry)
    store(folder / TOKENIZER, content)
    return Change(f"added token {short(token)} with the id {number}")


def set_model(folder: Path, rng: Random) -> Change:
    content = load(folder / TOKENIZER)
    value = rng.choice(
        [
            {"type": "x"},
            {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
            {"type": "WordLevel", "vocab": {}, "unk_token": "a"},
            {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0, "byte_fallback": False},
            {"type": "Unigram", "vocab": [], "unk_id": 7, "byte_fallback": False},
            {"type": "BPE", "vocab": {}, "merges": []},
            {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
            {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]},
            {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 2.0},
            {**content["model"], "merges": [["a", "b"]]},
            {**content["model"], "unk_token": "zzz"},
            {**content["model"], "byte_fallback": True},
            {**content["model"], "dropout": 0.5},
        ]
    )
    content["model"] = value
    store(folder / TOKENIZER, content)
    return Change(f"tokenizer model = {short(value)}")


def add_file(folder: Path, rng: Random) -> Change:
    name, content = rng.choice(FILES)
    (folder / name).write_text(content)
    return Change(f"{name} holds {short(content)}")


def only_other_file(folder: Path, rng: Random) -> Change:
    (folder / TOKENIZER).unlink()
    name, content = rng.choice([*FILES, ("vocab.txt", "a\nb\n"), ("x.tiktoken", "YQ== 0\n"), ("tokenizer.model", "")])
    (folder / name).write_text(content)
    return Change(f"no tokenizer.json; {name} holds {short(content)}")


MUTATORS: tuple[Mutator, ...] = (
    *(set_setting,) * 6,
    set_part,
    set_part,
    set_post_processor,
    set_id,
    drop_token,
    add_token,
    set_model,
    add_file,
    add_file,
    only_other_file,
    *of_text(TOKENIZER),
    *of_tree(TOKENIZER),
    *of_text(SETTINGS)[1:],
    *of_tree(SETTINGS)[:2],
)
