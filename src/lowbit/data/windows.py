"""Windows of token ids: their length, what each of them starts with, and their digest.

A model whose tokenizer puts special tokens before a text (BOS in most cases) has seen nothing else in training and is
out of its distribution without them: Gemma 3 270M has a perplexity of 51.5 on windows cut out of a stream and of 21.8
on the same text with BOS in front of each window. Hence the default, ``auto``. ``stream`` is the protocol of the
papers (GPTQ, OmniQuant, AffineQuant, QLLM): the corpus is tokenized as a whole with its special tokens, and only the
window at its start has them. For a tokenizer that adds none, all three give the same windows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lowbit.data.tokenization import decode, encode
from lowbit.errors import LowbitError, check_least, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Bos = Literal["auto", "never", "stream"]
BOS: tuple[Bos, ...] = get_args(Bos)
# Texts that any tokenizer encodes, to see what it puts around them.
_PROBES = ("a", "1", "the")


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids, and their origin.

    Attributes:
        ids: ``(windows, length)`` int64.
        corpus: label for reports; for a file its name without folders.
        bos: the protocol: ``auto``, ``never`` or ``stream``.
        prefix: the special tokens that every window starts with; they are not scored.
        seed: of the draw of windows; ``None`` for evaluation.
        kinds: each window's kind of text, such as ``wiki`` or a file's name; the same for all in evaluation.
        held_out: the kind whose windows are all in the validation split of learned steps; ``None``: that split has a
            share of every kind. See ``mixture.py``.
    """

    ids: Tensor
    corpus: str
    bos: Bos = "auto"
    prefix: tuple[int, ...] = ()
    seed: int | None = None
    kinds: tuple[str, ...] = ()
    held_out: str | None = None

    @property
    def first(self) -> int:
        """Position of a window's first scored token: the first one behind the prefix that has a token before it."""
        return max(1, len(self.prefix))

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) * (self.ids.shape[1] - self.first)

    @property
    def hash(self) -> str:
        """SHA-256 over shape, ids and prefix as little-endian int64."""
        parts = [torch.tensor(self.ids.shape), self.ids.flatten(), torch.tensor(self.prefix, dtype=torch.int64)]
        return hashlib.sha256(torch.cat(parts).numpy().astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class WindowShape:
    """How windows are made from the ids of a text.

    Attributes:
        length: tokens in a window, its prefix included.
        bos: the protocol.
        prefix: the special tokens in front of each window.
        before, after: the special tokens around a whole corpus.
    """

    length: int
    bos: Bos = "auto"
    prefix: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def text(self) -> int:
        """Tokens of text in a window."""
        return self.length - len(self.prefix)

    def window(self, ids: Tensor, start: int) -> Tensor:
        """The window over text ``ids`` ``(tokens,)`` at ``start``: ``(length,)``.

        Text that begins with the prefix itself, as a rendered conversation may, is not given a second one.

        >>> shape = WindowShape(length=4, prefix=(1,))
        >>> shape.window(torch.tensor([5, 6, 7, 8, 9]), 1).tolist()
        [1, 6, 7, 8]
        >>> shape.window(torch.tensor([1, 6, 7, 8, 9]), 0).tolist()
        [1, 6, 7, 8]
        """
        if self.prefix and start + self.length <= len(ids) and self.starts(ids, start):
            return ids[start : start + self.length]
        return torch.cat([torch.tensor(self.prefix, dtype=ids.dtype), ids[start : start + self.text]])

    def starts(self, ids: Tensor, start: int = 0) -> bool:
        """Whether ``ids`` have the prefix at ``start``."""
        return bool(self.prefix) and tuple(ids[start : start + len(self.prefix)].tolist()) == self.prefix


def window_shape(tokenizer: Tokenizer, length: int, bos: Bos) -> WindowShape:
    """The shape of a tokenizer's windows; raises ``LowbitError`` for a length or a protocol that cannot be."""
    check_least("length", length, 2, "give the number of tokens in a window")
    if bos not in BOS:
        raise unknown("--bos", bos, BOS)
    before, after = special_tokens(tokenizer)
    if bos == "never":
        return WindowShape(length, bos)
    if bos == "stream":
        return WindowShape(length, bos, (), before, after)
    if length <= len(before):
        raise LowbitError(
            f"length {length} given; the tokenizer puts {len(before)} special tokens before a text: give more, or "
            "--bos never"
        )
    return WindowShape(length, bos, before)


def special_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a tokenizer puts before and behind a text, such as BOS and EOS; both may be empty."""
    for text in _PROBES:
        whole, bare = encode(tokenizer, text, special_tokens=True), encode(tokenizer, text)
        for start in range(len(whole) - len(bare) + 1) if bare else ():
            if whole[start : start + len(bare)] == bare:
                return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


def special_before(tokenizer: Tokenizer) -> str:
    """The special tokens, such as BOS, that a tokenizer puts before a text; may be empty."""
    return decode(tokenizer, special_tokens(tokenizer)[0])
