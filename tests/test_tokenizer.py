"""A tokenizer that needs a package says which, by what its file is; every other failure is one line too."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowbit.checkpoints import tokenizer as module
from lowbit.checkpoints.tokenizer import kind_of, load_tokenizer
from lowbit.data.tokenization import decode, encode
from lowbit.errors import LowbitError, MissingExtra
from tiny import tiny_model, tiny_tokenizer

SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00\x00\x00\x18\x03"
TIKTOKEN = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
# By case: the file, its content, the packages that are not installed, and the one that is named.
NEEDS = {
    "a SentencePiece model": ("tokenizer.model", SENTENCEPIECE, {"sentencepiece", "tiktoken"}, "sentencepiece"),
    "of another name": ("spiece.model", SENTENCEPIECE, {"sentencepiece"}, "sentencepiece"),
    "without protobuf": ("tokenizer.model", SENTENCEPIECE, {"google.protobuf"}, "protobuf"),
    "a tiktoken vocabulary": ("words.tiktoken", TIKTOKEN, {"tiktoken", "sentencepiece"}, "tiktoken"),
    "named like a SentencePiece model": ("tokenizer.model", TIKTOKEN, {"tiktoken", "sentencepiece"}, "tiktoken"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = tiny_model("llama", num_hidden_layers=1).config
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return tmp_path


@pytest.mark.parametrize("case", NEEDS)
def test_the_package_that_is_missing_is_named(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content, absent, package = NEEDS[case]
    (folder / name).write_bytes(content)

    def fail(*_: object, **__: object) -> object:  # as the library does, whichever reader it tried last
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.\nInstall it with `pip install tiktoken`.")

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr(module, "_installed", lambda wanted: wanted not in absent)
    with pytest.raises(MissingExtra) as caught:
        load_tokenizer(folder)
    assert f"({name}), needs the package '{package}': pip install 'lowbit[sentencepiece]'" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(module, "_installed", lambda wanted: True)
    with pytest.raises(LowbitError, match="cannot load the tokenizer in") as caught_other:
        load_tokenizer(folder)
    assert not isinstance(caught_other.value, MissingExtra)


def test_a_tokenizer_json_needs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(SENTENCEPIECE)
    monkeypatch.setattr(module, "_installed", lambda wanted: False)
    assert load_tokenizer(folder)("abc").input_ids
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(LowbitError, match="cannot load the tokenizer in"):
        load_tokenizer(folder)


def test_installed_is_what_can_be_imported() -> None:
    assert module._installed("json.decoder")
    assert not module._installed("no_such_package")
    assert not module._installed("no_such_package.part")


def test_the_content_and_not_the_name_says_what_a_file_is(tmp_path: Path) -> None:
    for name, content, kind in (
        ("a.model", TIKTOKEN, "tiktoken vocabulary"),
        ("b.model", SENTENCEPIECE, "SentencePiece model"),
        ("c.tiktoken", TIKTOKEN.replace(b"\n", b"\r\n"), "tiktoken vocabulary"),
        ("vocab.json", b"{}", None),
    ):
        (tmp_path / name).write_bytes(content)
        assert kind_of(tmp_path / name) == kind


def test_the_config_of_the_model_does_not_stop_a_tokenizer(folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": "odd", "dtype": "float99"}))
    assert load_tokenizer(folder)("abc").input_ids


# By case: changes of tokenizer.json, and what a reader must say.
BROKEN = {
    "a template of two ids in one place": (
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "post_processor",
    ),
    "a table of characters that is none": (
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        "normalizer",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_panics_of_native_code_are_one_line(case: str, folder: Path) -> None:
    """They are no ``Exception``: one comes when the file is read, the other with the first text."""
    part, field = BROKEN[case]
    tiny_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {field: part}))
    with pytest.raises(LowbitError, match="the tokenizer in") as caught:
        encode(load_tokenizer(folder), "abc", special_tokens=True)
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("failure", [Exception("a\nb"), RecursionError(), TypeError("x")])
def test_whatever_a_tokenizer_raises_is_one_line(failure: Exception, folder: Path) -> None:
    def fail(*_: object, **__: object) -> object:
        raise failure

    tokenizer = SimpleNamespace(name_or_path="there", decode=fail)
    with pytest.raises(LowbitError, match=r"the tokenizer in there cannot decode ids \(.+\): fetch"):
        decode(tokenizer, [1])


def test_being_stopped_is_no_fault_of_the_tokenizers() -> None:
    def stop(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(SimpleNamespace(name_or_path="there", decode=stop), [1])


@pytest.mark.parametrize("length", ["x", "512", [1], {}, True, 5, 1e30, float("nan")])
def test_a_largest_length_is_a_number(length: object, folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    if isinstance(length, int | float):
        assert encode(load_tokenizer(folder), "abcdefgh") == encode(tiny_tokenizer(), "abcdefgh")
        return
    with pytest.raises(LowbitError, match=r"tokenizer_config\.json has model_max_length = .*: allowed are numbers"):
        load_tokenizer(folder)
