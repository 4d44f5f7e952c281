"""A folder's tokenizer, and what its kind of file needs installed.

``tokenizer.json`` and ``tekken.json`` need nothing. A SentencePiece model or a tiktoken vocabulary is converted by
``transformers`` with packages that lowbit does not require; where one is missing, the library tries the wrong reader
next and names that one's package. So the file itself says what it is, and the message names what it needs.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lowbit.checkpoints.companions import CONFIG, TOKENIZER_CONFIG
from lowbit.checkpoints.config import load_config
from lowbit.checkpoints.gguf_tokenizer import why_none
from lowbit.errors import LowbitError, MissingExtra, one_line, panics_as_errors, shown

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
EXTRA = "sentencepiece"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n")  # a token in base64 and its rank
# By kind of file: packages as they are installed, and the modules that they provide.
_PACKAGES = {
    "SentencePiece model": {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"},
    "tiktoken vocabulary": {"tiktoken": "tiktoken"},
}


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, without network access. Raises ``LowbitError`` if it is missing or broken."""
    if not any(next(folder.glob(name), None) for name in TOKENIZER_FILES):
        raise _no_tokenizer(folder)
    # Given the config, the library does not build it from the file, whose fields may stop it.
    config = load_config(folder, trust_remote_code) if (folder / CONFIG).is_file() else None
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # the tokenizers library raises nothing narrower
        if "trust_remote_code" in str(error):
            raise LowbitError(f"the tokenizer in {folder} needs remote code: pass --trust-remote-code") from error
        for package, file in _missing(folder):
            raise MissingExtra(package, EXTRA, f"the tokenizer in {folder}, a {file},") from error
        raise LowbitError(f"cannot load the tokenizer in {folder}: {one_line(error)}") from error
    if not isinstance(tokenizer.model_max_length, int | float):
        raise LowbitError(
            f"{folder / TOKENIZER_CONFIG} has model_max_length = {shown(tokenizer.model_max_length)}: allowed are "
            "numbers; correct or remove it"
        )
    # The tokenizer stores its arguments and would write this one into tokenizer_config.json.
    tokenizer.init_kwargs.pop("local_files_only", None)
    return tokenizer


def _no_tokenizer(folder: Path) -> LowbitError:
    if told := why_none(folder):
        return LowbitError(f"{told}: use the model's own folder, or a .gguf file that has one")
    return LowbitError(f"no tokenizer in {folder}: put the model's tokenizer files (tokenizer.json, ...) there")


def _missing(folder: Path) -> Iterator[tuple[str, str]]:
    """Packages that the folder's tokenizer needs and that are not installed, each with the file's kind and name."""
    if (folder / "tokenizer.json").is_file():
        return
    for path in sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        kind = kind_of(path)
        for package, module in _PACKAGES.get(kind or "", {}).items():
            if not _installed(module):
                yield package, f"{kind} ({path.name})"


def kind_of(path: Path) -> str | None:
    """What a tokenizer's file is, by its content: Llama 3 names a tiktoken vocabulary ``tokenizer.model``."""
    if path.suffix not in (".model", ".tiktoken"):
        return None
    with path.open("rb") as file:
        return "tiktoken vocabulary" if _TIKTOKEN_LINE.match(file.read(1024)) else "SentencePiece model"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
