"""Token windows for calibration and for perplexity.

* Calibration windows start at ``randint(0, tokens - length - 1)`` and may overlap, evaluation windows are
  consecutive, as in the papers (GPTQ, OmniQuant, AffineQuant, QLLM); ``windows.py`` says what a window starts with.
  Rejected: padding and attention masks; every window is full.
* ``builtin`` comes from a published package, for machines without access to a hub; it is not WikiText-2. Calibration
  draws from a mixture of its kinds of text (``builtin.py``), evaluation uses Wikipedia alone, because a mean over
  several kinds of text says less than each.
* A path gives the same text to both functions; to keep them separate, give two files.
* Several corpora are drawn from in turn for calibration, and measured one by one for evaluation. Every window carries
  its kind of text; where windows of several kinds lie decides which of them learned steps validate on
  (``mixture.py``).
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.data import hub
from lowbit.data.builtin import BUILTIN, MIXTURE, builtin_text
from lowbit.data.chat import FIELDS, Document, documents
from lowbit.data.files import PATHS, PLAIN, SUFFIXES, row_file, text_file
from lowbit.data.hub import HUB
from lowbit.data.mixture import arranged, held_out_kind, turns
from lowbit.data.sources import WHOLE, Conversations, Pages, RunningText, Source
from lowbit.data.windows import Bos, Tokens, WindowShape, window_shape
from lowbit.errors import LowbitError, check_least, unknown
from lowbit.paths import user_path
from lowbit.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

C4_WINDOWS = 256  # the papers' number of evaluation windows on C4
JOINT = "\n\n"  # between documents
NAMES = ("builtin", *(f"builtin:{name}" for name in BUILTIN), *HUB)
SELF = "self"


@dataclass(frozen=True)
class Texts:
    """Texts given as such, in place of a corpus's name or a file."""

    texts: tuple[str, ...]

    def __str__(self) -> str:
        digest = hashlib.sha256("\0".join(self.texts).encode("utf-8", "surrogatepass")).hexdigest()
        return f"{len(self.texts)} given texts {digest[:8]}"


@dataclass(frozen=True)
class Part:
    """A part of a corpus, and its share of the windows drawn from the corpus.

    Attributes:
        kind: its kind of text: ``wiki``, ``c4`` and so on for the built-in texts and those of the hub, else its name.
        source: gives its windows; ``None``: the model does.
        share: 1 for a corpus of one kind.
    """

    kind: str
    source: Source | None = None
    share: Fraction = Fraction(1)


Corpus = str | Texts
Data = str | Path | Sequence[str | Path]


def corpus_name(given: str) -> str:
    """A corpus's name in its own spelling, whatever its case; anything else, such as a path, as given.

    >>> corpus_name("WikiText2"), corpus_name("./C4.txt")
    ('wikitext2', './C4.txt')
    """
    return next((name for name in (*NAMES, SELF) if name == given.casefold()), given)


def corpora(data: Data) -> tuple[Corpus, ...]:
    """The corpora of an argument ``data``: a name, a path, several of them, or a list of texts.

    A list is one of texts if none of its strings is a corpus's name or ends like a text file, and not all are words.

    >>> corpora(["wikitext2", "chats.jsonl"]), [str(corpus) for corpus in corpora(["One text.", "Another."])]
    (('wikitext2', 'chats.jsonl'), ['2 given texts c48bcc8f'])
    """
    if isinstance(data, str | Path):
        return (corpus_name(str(data)),)
    given = [corpus_name(str(one)) if isinstance(one, str | Path) else one for one in data]
    if not given or not all(isinstance(one, str) for one in given):
        raise LowbitError(f"data {data!r:.100} given; give a name, {PATHS}, several of them, or a list of texts")
    named = [one in (*NAMES, SELF) or _is_path(one) for one in given]
    if not any(named) and any(len(one.split()) > 1 for one in given):
        return (Texts(tuple(given)),)
    return tuple(dict.fromkeys(given))


def _is_path(one: str) -> bool:
    """Whether a string with blanks in it names a file, and is no text.

    >>> [_is_path(one) for one in ("My texts.txt", "My Corpus/wiki train.docx", "Read him/her twice.", "One.\\n.txt")]
    [True, True, False, False]
    """
    path = Path(one)
    if "\n" in one:
        return False
    ends_like_one = len(path.parts) > 1 and path.suffix[1:].isalnum() and len(path.suffix) <= 6
    return path.suffix.lower() in SUFFIXES or ends_like_one or os.path.exists(one)


def calibration(
    data: Data,
    tokenizer: Tokenizer,
    n: int,
    length: int,
    seed: int,
    *,
    bos: Bos = "auto",
    cache: Path | None = None,
    sampler: Callable[[int, WindowShape, int], Tensor] | None = None,
) -> Tokens:
    """``n`` windows of ``length`` tokens at random offsets from ``random.Random(seed)``.

    Args:
        data: one of ``NAMES``, ``self``, a path, a list of these, or a list of texts.
        tokenizer: the model's.
        n, length, seed: number of windows, their tokens, and the seed of the draw.
        bos: what a window starts with: ``auto``, ``never`` or ``stream``.
        cache: the folder for the built-in text; hub data sets are in the hub's own cache.
        sampler: ``sampler(n, shape, seed)`` gives the windows of ``self``, sampled from the model.

    Several corpora give windows in turn, ``builtin`` those of its kinds in the shares of its mixture; windows of
    several kinds lie where ``mixture.arranged`` puts them. ``c4`` draws a document, then an offset in it; a window of
    conversations starts where one starts. Raises ``LowbitError`` for an unknown name, an unreadable file, a text
    shorter than one window and sizes below 1 (``length``: 2), ``MissingExtra`` for a missing package.
    Ten tokens 0..9 with ``n=2, length=3, seed=0``: the offsets are drawn as 6 and 3: ``[[6, 7, 8], [3, 4, 5]]``.
    """
    check_least("n", n, 1, "give the number of windows")
    shape = window_shape(tokenizer, length, bos)
    given = corpora(data)
    if SELF in given and sampler is None:
        raise LowbitError("data 'self' is sampled from a model: give a text where there is none")
    opened = [
        (SELF, [Part(SELF)]) if corpus == SELF else _open(corpus, 0, tokenizer, shape, cache) for corpus in given
    ]
    parts = [part for _, corpus_parts in opened for part in corpus_parts]
    drawn = [parts[i] for i in turns([part.share / len(opened) for part in parts], n)]
    kinds = [part.kind for part in drawn]
    rng = random.Random(seed)
    label = " + ".join(label for label, _ in opened)
    own = sum(part.source is None for part in drawn)
    sampled = (
        iter(sampler(own, shape, seed).to("cpu", torch.int64).view(own, length)) if sampler and own else iter(())
    )
    texts = track(drawn, f"drawing from {label}") if own < n else drawn
    windows = torch.stack([next(sampled) if part.source is None else part.source.draw(rng) for part in texts])
    placed = arranged(kinds, held_out := held_out_kind(kinds, seed))
    return Tokens(windows[placed], label, bos, shape.prefix, seed, tuple(kinds[i] for i in placed), held_out)


def evaluation(
    corpus: Corpus | Path,
    tokenizer: Tokenizer,
    length: int,
    tokens: int | None = None,
    *,
    bos: Bos = "auto",
    cache: Path | None = None,
) -> Tokens:
    """Consecutive windows of ``length`` tokens without overlap; an incomplete last window is dropped.

    ``tokens`` limits the total, rounded down to whole windows; the remaining windows do not change. ``builtin`` is
    its Wikipedia part; ``c4`` the papers' 256 windows, each at a random offset of a random document, drawn with
    ``random.Random(0)``. Names, paths, ``bos`` and errors as in ``calibration``; ``self`` is an error.
    Ten tokens 0..9 with ``length=3``: ``[[0, 1, 2], [3, 4, 5], [6, 7, 8]]``; with ``tokens=7`` the first two.
    """
    shape = window_shape(tokenizer, length, bos)
    if tokens is not None and tokens < length:
        raise LowbitError(f"{tokens} tokens given, one window needs {length}: give more tokens or less length")
    if not isinstance(corpus, Texts):
        corpus = corpus_name(str(corpus))
    if corpus == SELF:
        raise LowbitError("data 'self' is for calibration only: evaluate on a text, for example 'builtin'")
    label, (part,) = _open(corpus, 1, tokenizer, shape, cache)
    assert part.source is not None, "only the model's own text has none"
    ids = part.source.cut(None if tokens is None else tokens // length)
    return Tokens(ids, label, bos, shape.prefix, kinds=(part.kind,) * len(ids))


def _open(
    corpus: Corpus, part: int, tokenizer: Tokenizer, shape: WindowShape, cache: Path | None
) -> tuple[str, list[Part]]:
    """Label and parts of a corpus; ``part`` 0 is for calibration, 1 for evaluation, where there is one."""
    if isinstance(corpus, Texts):
        name = str(corpus)
        return name, [Part(name, _in_memory(name, tokenizer, shape, JOINT.join(corpus.texts)))]
    if corpus in NAMES and corpus.startswith("builtin"):
        kind = corpus[8:] or ("" if part == 0 else "wiki")
        shares = {kind: Fraction(1)} if kind else MIXTURE
        label = f"builtin:{'+'.join(shares)} ({('first 80', 'last 20')[part]} %)"
        texts = {kind: builtin_text(kind, cache)[part] for kind in shares}
        return label, [
            Part(kind, _in_memory(f"builtin:{kind}", tokenizer, shape, text), shares[kind])
            for kind, text in texts.items()
        ]
    if corpus in HUB:
        pages, label = hub.hub_documents(HUB[corpus], part), f"{corpus}/{HUB[corpus].splits[part]}"
        joint = HUB[corpus].joint
        if joint is None:
            return label, [Part(HUB[corpus].kind, Pages(label, tokenizer, shape, pages, C4_WINDOWS))]
        return label, [Part(HUB[corpus].kind, _in_memory(label, tokenizer, shape, joint.join(pages)))]
    if Path(corpus).suffix or Path(corpus).name != corpus:
        return Path(corpus).name, [Part(Path(corpus).name, _from_file(user_path(corpus), tokenizer, shape))]
    raise LowbitError(f"{unknown('data', corpus, NAMES if part else (*NAMES, SELF))}; or {PATHS}")


def _in_memory(label: str, tokenizer: Tokenizer, shape: WindowShape, text: str) -> Source:
    return RunningText(label, tokenizer, shape, lambda start: [text[start:]], len(text), len(text) <= WHOLE)


def _from_file(path: Path, tokenizer: Tokenizer, shape: WindowShape) -> Source:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LowbitError(f"'{path}' is not a supported text file: give {PATHS}, or {', '.join(NAMES)}")
    if suffix in PLAIN:
        file = text_file(path)
        return RunningText(path.name, tokenizer, shape, file.parts, file.size, file.size <= WHOLE)
    rows = row_file(path, FIELDS)

    def pages(position: int) -> Iterator[Document]:
        return documents(rows.rows(position), tokenizer)

    first = next(pages(0), None)
    if first is not None and first.chat:
        return Conversations(
            path.name, tokenizer, shape, lambda start: (page.text for page in pages(start)), rows.size
        )
    whole = path.stat().st_size <= WHOLE
    return RunningText(path.name, tokenizer, shape, lambda start: _joined(pages(start)), rows.size, whole)


def _joined(pages: Iterator[Document]) -> Iterator[str]:
    """The text of documents with an empty line between them."""
    texts = (page.text for page in pages)
    return chain(islice(texts, 1), (JOINT + text for text in texts))
