"""Where windows come from: one running text, many pages, or conversations.

Each source turns a corpus into windows of ids in two ways: ``draw`` takes one at random, for calibration, ``cut``
takes consecutive ones, for evaluation.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.data.tokenization import encode, encode_parts
from lowbit.data.windows import WindowShape
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

WHOLE = 1 << 24  # characters from which a text is no longer tokenized whole to draw from it
TRIES = 10_000  # pages or places drawn for one window before giving up


@dataclass(frozen=True)
class Source(ABC):
    """A corpus as windows of one shape.

    Attributes:
        label: the corpus's name in errors.
        tokenizer: the model's.
        shape: of the windows.
    """

    label: str
    tokenizer: Tokenizer
    shape: WindowShape

    @abstractmethod
    def draw(self, rng: random.Random) -> Tensor:
        """A window ``(length,)`` at a random place."""

    @abstractmethod
    def cut(self, limit: int | None) -> Tensor:
        """Consecutive windows ``(windows, length)``, at most ``limit`` of them; an incomplete last one is dropped."""

    def _short(self, tokens: int) -> LowbitError:
        needed = self.shape.text
        return LowbitError(
            f"{self.label} has {tokens} tokens, a window needs {needed}: give more text or less length"
        )


@dataclass(frozen=True)
class RunningText(Source):
    """One text, read as ``parts(position)``: strings from a position on.

    A text of up to ``WHOLE`` characters is drawn from as the papers do: a random offset among all its tokens. A
    longer one is not tokenized whole: a random position of the file is drawn, the window starts at the next word.

    Attributes:
        parts: the text from a position on, in parts.
        size: its number of positions.
        whole: whether all of it may be tokenized.
    """

    parts: Callable[[int], Iterable[str]]
    size: int
    whole: bool = True

    @cached_property
    def _ids(self) -> Tensor:
        # 32 bits are enough for any vocabulary, and halve what a text of many megabytes takes.
        ids = torch.cat([torch.empty(0, dtype=torch.int32), *(ids.int() for ids in self._encoded(0))])
        if len(ids) < self.shape.text:
            raise self._short(len(ids))
        return ids

    def _encoded(self, position: int) -> Iterator[Tensor]:
        """Ids from a position on, with the special tokens around a whole corpus where the protocol has them."""
        pieces = encode_parts(self.tokenizer, self.parts(position))
        if position:
            return pieces
        before, after = (torch.tensor(ids, dtype=torch.int64) for ids in (self.shape.before, self.shape.after))
        return (ids for part in ([before], pieces, [after]) for ids in part)

    def draw(self, rng: random.Random) -> Tensor:
        """See ``Source``. Ten tokens 0..9 and a shape of 3: ``randint(0, 6)`` is the start."""
        if self.whole:
            return self.shape.window(self._ids, rng.randint(0, max(len(self._ids) - self.shape.text - 1, 0))).long()
        for _ in range(TRIES):
            # A few characters a token, so that about one window is tokenized and no more.
            start, piece = rng.randrange(self.size), max(1 << 12, 8 * self.shape.length)
            ids = _first(encode_parts(self.tokenizer, self.parts(start), piece), self.shape.length)
            if len(ids) >= self.shape.text:
                return self.shape.window(ids, 0)
        raise self._short(len(ids))

    def cut(self, limit: int | None) -> Tensor:
        """See ``Source``. A text is read as far as windows are asked for."""
        return _consecutive(self._encoded(0), self.shape, limit, self._short)


@dataclass(frozen=True)
class Pages(Source):
    """Separate documents, of which each window is a random part of one (the papers' protocol for C4).

    Attributes:
        pages: the documents.
        windows: the number of windows for evaluation, drawn with ``random.Random(0)``.
    """

    pages: Sequence[str]
    windows: int

    def draw(self, rng: random.Random) -> Tensor:
        """See ``Source``."""
        for _ in range(TRIES if len(self.pages) else 0):
            ids = torch.tensor(
                [*self.shape.before, *encode(self.tokenizer, rng.choice(self.pages)), *self.shape.after],
                dtype=torch.int64,
            )
            if len(ids) > self.shape.text:
                return self.shape.window(ids, rng.randint(0, len(ids) - self.shape.text - 1))
        raise LowbitError(
            f"{self.label}: no document of more than {self.shape.text} tokens found: give a shorter length"
        )

    def cut(self, limit: int | None) -> Tensor:
        """See ``Source``."""
        rng = random.Random(0)
        return torch.stack([self.draw(rng) for _ in range(min(self.windows, limit or self.windows))])


@dataclass(frozen=True)
class Conversations(Source):
    """Rendered conversations: a window starts where one starts, and goes on with those behind it until it is full.

    Attributes:
        chats: the conversations from a position on.
        size: number of positions.
    """

    chats: Callable[[int], Iterable[str]]
    size: int

    def draw(self, rng: random.Random) -> Tensor:
        """See ``Source``. Behind the last conversation comes the first."""
        start = rng.randrange(self.size)
        ids = _first(self._encoded(start), self.shape.length)
        while len(ids) < self.shape.length and (again := _first(self._encoded(0), self.shape.length)).numel():
            ids = torch.cat([ids, again])
        if len(ids) < self.shape.text:
            raise self._short(len(ids))
        return self.shape.window(ids, 0)

    def cut(self, limit: int | None) -> Tensor:
        """See ``Source``."""
        return _consecutive(self._encoded(0), self.shape, limit, self._short)

    def _encoded(self, position: int) -> Iterator[Tensor]:
        for text in self.chats(position):
            yield torch.tensor(encode(self.tokenizer, text), dtype=torch.int64)


def _first(pieces: Iterator[Tensor], count: int) -> Tensor:
    """The first ``count`` ids, or all if there are fewer."""
    held: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    total = 0
    for ids in pieces:
        held.append(ids)
        total += len(ids)
        if total >= count:
            break
    return torch.cat(held)[:count]


def _consecutive(
    pieces: Iterator[Tensor], shape: WindowShape, limit: int | None, short: Callable[[int], LowbitError]
) -> Tensor:
    """Windows ``(windows, length)`` one behind the other, each ``shape.text`` tokens of text further.

    Text that starts with the prefix itself gives a window of ``shape.length`` tokens of text.
    """
    windows: list[Tensor] = []
    held, total = torch.empty(0, dtype=torch.int64), 0
    for ids in pieces:
        held, total, start = torch.cat([held, ids]), total + len(ids), 0
        while (limit is None or len(windows) < limit) and len(held) - start >= shape.length:
            windows.append(shape.window(held, start))
            start += shape.length if shape.starts(held, start) else shape.text
        held = held[start:]
        if limit is not None and len(windows) == limit:
            break
    # The last window needs no more than its own text.
    if (limit is None or len(windows) < limit) and len(held) >= shape.text and not shape.starts(held):
        windows.append(shape.window(held, 0))
    if not windows:
        raise short(total)
    return torch.stack(windows)
