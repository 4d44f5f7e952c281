"""Tokenizers of ``.gguf`` files: what passes is an error; what is the file's is kept until versions change."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowbit.checkpoints import gguf_tokenizer
from lowbit.checkpoints.gguf_tokenizer import NO_TOKENIZER
from lowbit.checkpoints.resolve import load_tokenizer, resolve
from lowbit.errors import LowbitError
from test_gguf_reader import write_gguf


def in_context(outer: Exception, inner: Exception) -> Exception:
    """An error that was raised while another one was handled."""
    outer.__context__ = inner
    return outer


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


FULL = OSError(errno.ENOSPC, "No space left on device")
PASSING = [
    (FULL, "free some space, or set LOWBIT_CACHE"),
    (Exception("No space left on device (os error 28)"), "free some space"),  # as the tokenizers library says it
    (in_context(ValueError("cannot read"), FULL), "free some space"),
    (MemoryError(), "free some memory"),
    (ImportError("tiktoken is required"), "install the package that it needs"),
    (caused(ValueError("no converter"), ModuleNotFoundError("No module named 'tiktoken'")), "install the package"),
]


@pytest.mark.parametrize("at", ["from_pretrained", "save_pretrained"])
@pytest.mark.parametrize(("failure", "advice"), PASSING)
def test_a_failure_that_passes_is_an_error_and_nothing_is_kept(
    at: str, failure: Exception, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "m.gguf")

    def fail(*args: Any, **more: Any) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer if at == "from_pretrained" else PreTrainedTokenizerBase, at, fail)
        with pytest.raises(LowbitError) as caught:
            resolve(str(file), cache=tmp_path / "cache")
        wanted = "cannot create" if failure is FULL and at == "save_pretrained" else advice
        assert wanted in str(caught.value)
    folder = resolve(str(file), cache=tmp_path / "cache").folder
    assert load_tokenizer(folder)("he").input_ids


@pytest.mark.parametrize(
    "failure",
    [
        ValueError("Cannot build a tokenizer"),
        OSError("Can't load the tokenizer"),  # as transformers says it: without a number
        in_context(ValueError("no merges"), ImportError("a faster library")),
    ],
)
def test_what_is_wrong_with_the_file_is_kept_until_the_versions_change(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, cache, asked = write_gguf(tmp_path / "m.gguf"), tmp_path / "cache", []

    def fail(*args: Any, **more: Any) -> None:
        asked.append(args)
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", fail)
        for _ in range(2):
            folder = resolve(str(file), cache=cache).folder
        assert len(asked) == 1
        with pytest.raises(LowbitError, match=r"^m\.gguf has no tokenizer .*: use the model's own folder") as caught:
            gguf_tokenizer_error(folder)
        assert "tokenizers" not in str(caught.value)  # the versions are not told
        patch.setattr("tokenizers.__version__", "99.0")
        for _ in range(2):
            assert resolve(str(file), cache=cache).folder == folder
        assert len(asked) == 2
    assert (folder / NO_TOKENIZER).is_file()
    weights = (folder / "model.safetensors").stat()
    assert resolve(str(file), cache=cache).folder == folder  # again with the installed version, which can
    assert load_tokenizer(folder)("he").input_ids
    assert not (folder / NO_TOKENIZER).exists()
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert not list(cache.rglob("lowbit-partial-*"))


def gguf_tokenizer_error(folder: Path) -> None:
    """What loading the tokenizer says, without the function that the test has replaced."""
    from lowbit.checkpoints.tokenizer import _no_tokenizer

    raise _no_tokenizer(folder)


def test_a_folder_of_an_earlier_version_is_looked_at_again(tmp_path: Path) -> None:
    file, cache = write_gguf(tmp_path / "m.gguf"), tmp_path / "cache"
    folder = resolve(str(file), cache=cache).folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / NO_TOKENIZER).write_text("m.gguf has no tokenizer that transformers can use (disk full)")
    assert load_tokenizer(resolve(str(file), cache=cache).folder)("he").input_ids
    assert gguf_tokenizer.why_none(folder) is None
