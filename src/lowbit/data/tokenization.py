"""Token ids of a text of any length in bounded memory: equal to those of the whole text tokenized at once.

Tokenizers take some 150 bytes of memory for each byte of text. A long text is therefore encoded in pieces. A cut is
taken only where it leaves the ids alone: the tokens around the place are the same with and without it. Each piece is
encoded with the last characters before it in front, whose ids are then dropped, because many tokenizers treat the
start of a text specially (SentencePiece puts a space there).

Rejected: cutting at every line end, which changes ids where a tokenizer joins line ends with what follows, and
offsets of tokens, which tokenizers written in Python lack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.errors import LowbitError, one_line, panics_as_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

PIECE = 1 << 19  # characters encoded at once
CONTEXT, GUARD = 512, 64  # characters around a cut that are compared, and characters in front of a piece
TRIES = 64  # places of each kind tried for a cut before a longer piece is
SURROGATE = re.compile("[\ud800-\udfff]")


def encode(tokenizer: Tokenizer, text: str, special_tokens: bool = False) -> list[int]:
    """Ids of a text; halves of a character outside the basic plane count as U+FFFD.

    Args:
        tokenizer: the model's.
        text: any.
        special_tokens: whether to put the special tokens around it that the tokenizer is set to.

    Raises:
        LowbitError: the tokenizer was loaded and fails on this text; its files contradict each other.
    """
    given = SURROGATE.sub("\ufffd", text)
    with _failures(tokenizer, "encode a text"):
        ids: list[int] = tokenizer(given, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    return ids


def decode(tokenizer: Tokenizer, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
    """The text of ids. Raises as ``encode`` does."""
    with _failures(tokenizer, "decode ids"):
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


@contextmanager
def _failures(tokenizer: Tokenizer, what: str) -> Iterator[None]:
    """Raise as ``LowbitError`` whatever the tokenizer raises."""
    try:
        with panics_as_errors():
            yield
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise LowbitError(
            f"the tokenizer in {tokenizer.name_or_path} cannot {what} ({one_line(error)}): fetch its files again"
        ) from error


def encode_parts(tokenizer: Tokenizer, parts: Iterable[str], piece: int = PIECE) -> Iterator[Tensor]:
    """Ids ``(tokens,)`` of the text that ``parts`` make up, piece by piece; concatenated, those of the whole text."""
    guard, held = "", ""
    for part in parts:
        held += part
        while len(held) > piece + CONTEXT:
            if not (cut := _cut(tokenizer, held, piece)):
                piece *= 2
                continue
            yield _behind(tokenizer, guard, held[:cut])
            guard, held = held[max(0, cut - GUARD) : cut], held[cut:]
    if held:
        yield _behind(tokenizer, guard, held)


def _behind(tokenizer: Tokenizer, guard: str, text: str) -> Tensor:
    """Ids of ``text`` where ``guard`` is before it."""
    start = len(encode(tokenizer, guard)) if guard else 0
    return torch.tensor(encode(tokenizer, guard + text)[start:], dtype=torch.int64)


def _cut(tokenizer: Tokenizer, text: str, piece: int) -> int:
    """A place near ``piece`` where a cut leaves the ids alone; 0 if there is none among those tried."""
    for place in _places(text, piece):
        left, right = text[max(0, place - CONTEXT) : place], text[place : place + CONTEXT]
        guard = left[-GUARD:]
        whole, first = encode(tokenizer, left + right), encode(tokenizer, left)
        if whole == first + encode(tokenizer, guard + right)[len(encode(tokenizer, guard)) :]:
            return place
    return 0


def _places(text: str, piece: int) -> Iterator[int]:
    """Places for a cut: behind line ends, then before spaces, then anywhere, each from ``piece`` backwards."""
    for mark, shift in (("\n", 1), (" ", 0)):
        place = piece
        for _ in range(TRIES):
            place = text.rfind(mark, piece // 2, place)
            if place < 0:
                break
            yield place + shift
    yield from range(piece, max(piece // 2, piece - TRIES), -1)
