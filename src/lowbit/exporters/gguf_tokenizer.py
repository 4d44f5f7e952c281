"""A tokenizer in GGUF: byte-level BPE (``gpt2``) or SentencePiece BPE (``llama``).

Pieces, merges, pre-tokenizer and special ids come from the tokenizer that transformers loads, not from file names.
llama.cpp knows pre-tokenizers by name only (``tokenizer.ggml.pre``); the name is found by comparing the rules
themselves. A pre-tokenizer without a known name is refused rather than written as ``default``, which would tokenize
differently without a message; ``--pre`` gives the name.

https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (regular expressions by name)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import TokenType

from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.data.tokenization import encode
from lowbit.errors import LowbitError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = (  # words with their marks, which other patterns take for punctuation
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PATTERNS = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _MARKS: "qwen35"}


def tokenizer_metadata(folder: Path, vocab_size: int, pre: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """GGUF keys and values of the folder's tokenizer, and warnings.

    Args:
        folder: folder with the tokenizer's files.
        vocab_size: rows of the embedding; ids without a piece get a placeholder of type ``UNUSED``.
        pre: llama.cpp's name of the pre-tokenizer, where it cannot be detected.

    Raises:
        LowbitError: there is no tokenizer, or llama.cpp has no equivalent.
    """
    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise LowbitError(f"the tokenizer in {folder} is Python code; gguf needs one with a tokenizer.json")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise LowbitError(f"the tokenizer in {folder} is a {model['type']} model; gguf export supports BPE only")
    warnings = _beyond(content, vocab_size)
    pieces, types = _pieces(content, vocab_size, folder)
    out: dict[str, Any] = {"tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": types}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        out |= _sentencepiece(content, pieces, merges)
    else:
        name = pre or splitting(content)
        if name is None:
            raise LowbitError(
                f"llama.cpp's name of the pre-tokenizer in {folder} is not known; give it with --pre, "
                "for example --pre qwen2"
            )
        out |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}
        if content.get("normalizer"):
            warnings.append(f"llama.cpp does not apply the tokenizer's {content['normalizer']['type']} normalizer")
    return out | _special(tokenizer, warnings), warnings


def _beyond(content: dict[str, Any], vocab_size: int) -> list[str]:
    """A warning of added tokens without an embedding: text models keep those of their family's models of images."""
    beyond = [token["content"] for token in content["added_tokens"] if int(token["id"]) >= vocab_size]
    if not beyond:
        return []
    return [f"the model has no embedding for {', '.join(beyond[:3])}: left out of the file's tokens"]


def _pieces(content: dict[str, Any], vocab_size: int, folder: Path) -> tuple[list[str], list[int]]:
    """Pieces and their types by id."""
    added = {int(token["id"]): token for token in content["added_tokens"] if int(token["id"]) < vocab_size}
    names = {int(i): piece for piece, i in content["model"]["vocab"].items()}
    names |= {i: token["content"] for i, token in added.items()}
    if max(names) >= vocab_size:
        raise LowbitError(f"the tokenizer in {folder} has id {max(names)}, the model {vocab_size} embeddings")
    pieces, types = [], []
    for i in range(vocab_size):
        pieces.append(names.get(i, f"[PAD{i}]"))
        if i in added:
            kind = TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
        elif i not in names:
            kind = TokenType.UNUSED
        elif content["model"].get("byte_fallback") and _is_byte(names[i]):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        if i in names and names[i] == content["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        types.append(int(kind))
    return pieces, types


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def splitting(content: dict[str, Any]) -> str | None:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer, or ``None``."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    whole = bool(content["model"].get("ignore_merges"))
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return None if whole else "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return None if whole else "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        name = _PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
        # Only for llama-bpe does llama.cpp keep a word that is one piece regardless of the merges.
        return name if whole == (name == "llama-bpe") else None
    return None


def _sentencepiece(content: dict[str, Any], pieces: list[str], merges: list[str]) -> dict[str, Any]:
    """Scores that encode the order of the merges: a piece's score is minus the rank of its first merge.

    llama.cpp merges the adjacent pair whose joint piece has the highest score. Merges that yield one piece are next
    to each other in the list that transformers derives from a SentencePiece model, so both orders are the same.
    """
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", ""), i)
    scores = [-float(rank.get(piece, len(merges))) for piece in pieces]
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    prefix = '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _special(tokenizer: Any, warnings: list[str]) -> dict[str, Any]:
    """Special ids, tokens added around a text (determined by tokenizing one), and the chat template."""
    out: dict[str, Any] = {}
    for key, field in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (number := getattr(tokenizer, f"{field}_token_id")) is not None:
            out[f"tokenizer.ggml.{key}_token_id"] = number
    ids = encode(tokenizer, "a", special_tokens=True)
    out["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    out["tokenizer.ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    template = tokenizer.chat_template
    if isinstance(template, dict):
        warnings.append(f"of the chat templates {', '.join(template)}, only the default is written")
        template = template.get("default")
    return out | ({"tokenizer.chat_template": template} if template else {})
