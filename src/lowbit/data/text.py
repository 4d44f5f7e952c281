"""Token windows for calibration and for perplexity.

* Calibration windows start at ``randint(0, tokens - length - 1)`` and may overlap, evaluation windows are
  consecutive, as in the papers (GPTQ, OmniQuant, AffineQuant, QLLM); ``windows.py`` says what a window starts with.
  Rejected: padding and attention masks; every window is full.
* ``builtin`` comes from a published package, for machines without access to a hub; it is not WikiText-2. The first
  80 % is for calibration, the last 20 % for evaluation, without its long lines that occur in both (one C4 page).
  Calibration alternates Wikipedia and C4, so that consecutive windows contain both; evaluation uses Wikipedia alone,
  because a mean over two kinds of text says less than either.
* A path gives the same text to both functions; to keep them separate, give two files.
* Several corpora are drawn from in turn for calibration, and measured one by one for evaluation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.checkpoints import pypi
from lowbit.data import hub
from lowbit.data.chat import FIELDS, Document, documents
from lowbit.data.files import PATHS, PLAIN, SUFFIXES, row_file, text_file
from lowbit.data.hub import HUB
from lowbit.data.sources import WHOLE, Conversations, Pages, RunningText, Source
from lowbit.data.windows import Bos, Tokens, WindowShape, window_shape
from lowbit.errors import LowbitError, check_least, unknown
from lowbit.paths import user_path
from lowbit.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

C4_WINDOWS = 256  # the papers' number of evaluation windows on C4
REPEATED = 100  # characters from which a line that occurs in both parts counts as repeated text
JOINT = "\n\n"  # between documents
BUILTIN = {  # text: SHA-256 of its file
    "wiki": "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
    "c4": "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
}
NAMES = ("builtin", *(f"builtin:{name}" for name in BUILTIN), *HUB)
SELF = "self"


@dataclass(frozen=True)
class Texts:
    """Texts given as such, in place of a corpus's name or a file."""

    texts: tuple[str, ...]

    def __str__(self) -> str:
        digest = hashlib.sha256("\0".join(self.texts).encode("utf-8", "surrogatepass")).hexdigest()
        return f"{len(self.texts)} given texts {digest[:8]}"


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
    named = [one in (*NAMES, SELF) or ("\n" not in one and Path(one).suffix.lower() in SUFFIXES) for one in given]
    if not any(named) and any(len(one.split()) > 1 for one in given):
        return (Texts(tuple(given)),)
    return tuple(dict.fromkeys(given))


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
        data: one of ``NAMES``, a path, a list of these, a list of texts, or ``self`` (then
            ``sampler(n, shape, seed)`` returns the ids).
        tokenizer: the model's.
        n, length, seed: number of windows, their tokens, and the seed of the draw.
        bos: what a window starts with: ``auto``, ``never`` or ``stream``.
        cache: the folder for the built-in text; hub data sets are in the hub's own cache.
        sampler: samples text from the model.

    Several corpora give windows in turn; ``builtin`` alternates its two texts; ``c4`` draws a document, then an
    offset in it; a window of conversations starts where one starts. Raises ``LowbitError`` for an unknown name, an
    unreadable file, a text shorter than one window and sizes below 1 (``length``: 2), ``MissingExtra`` for a missing
    package.
    Ten tokens 0..9 with ``n=2, length=3, seed=0``: the offsets are drawn as 6 and 3: ``[[6, 7, 8], [3, 4, 5]]``.
    """
    check_least("n", n, 1, "give the number of windows")
    shape = window_shape(tokenizer, length, bos)
    given = corpora(data)
    if SELF in given:
        if sampler is None or len(given) > 1:
            raise LowbitError("data 'self' is sampled from a model, and is given alone: give a text")
        ids = sampler(n, shape, seed).to("cpu", torch.int64).view(n, length)
        return Tokens(ids, SELF, bos, shape.prefix, seed)
    opened = [_open(corpus, 0, tokenizer, shape, cache) for corpus in given]
    sources = [source for _, parts in opened for source in parts]
    rng = random.Random(seed)
    label = " + ".join(label for label, _ in opened)
    windows = [sources[i % len(sources)].draw(rng) for i in track(range(n), f"drawing from {label}")]
    return Tokens(torch.stack(windows), label, bos, shape.prefix, seed)


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
    label, sources = _open(corpus, 1, tokenizer, shape, cache)
    return Tokens(sources[0].cut(None if tokens is None else tokens // length), label, bos, shape.prefix)


def _open(
    corpus: Corpus, part: int, tokenizer: Tokenizer, shape: WindowShape, cache: Path | None
) -> tuple[str, list[Source]]:
    """Label and sources of a corpus; ``part`` 0 is for calibration, 1 for evaluation."""
    if isinstance(corpus, Texts):
        return str(corpus), [_in_memory(str(corpus), tokenizer, shape, JOINT.join(corpus.texts))]
    if corpus in NAMES and corpus.startswith("builtin"):
        names = [corpus[8:]] if ":" in corpus else (["wiki", "c4"], ["wiki"])[part]
        label = f"builtin:{'+'.join(names)} ({('first 80', 'last 20')[part]} %)"
        return label, [_in_memory(label, tokenizer, shape, _builtin(name, cache)[part]) for name in names]
    if corpus in HUB:
        pages, label = hub.hub_documents(HUB[corpus], part), f"{corpus}/{HUB[corpus].splits[part]}"
        joint = HUB[corpus].joint
        if joint is None:
            return label, [Pages(label, tokenizer, shape, pages, C4_WINDOWS)]
        return label, [_in_memory(label, tokenizer, shape, joint.join(pages))]
    if Path(corpus).suffix or Path(corpus).name != corpus:
        return Path(corpus).name, [_from_file(user_path(corpus), tokenizer, shape)]
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


def _builtin(name: str, cache: Path | None) -> tuple[str, str]:
    """The first 80 % and the last 20 % of a built-in text, cut after a line."""
    raw = pypi.read_member(pypi.TEXTS, f"exllamav2/conversion/standard_cal_data/{name}.utf8", cache)
    if (digest := hashlib.sha256(raw).hexdigest()) != BUILTIN[name]:
        raise LowbitError(f"{name}.utf8 has SHA-256 {digest}, expected {BUILTIN[name]}: empty the wheel cache")
    text = "\n".join(line for line in raw.decode().split("\n") if not line.startswith(("<doc ", "</doc>")))
    cut = text.index("\n", len(text) * 4 // 5) + 1
    seen = {line for line in text[:cut].split("\n") if len(line) >= REPEATED}
    return text[:cut], "\n".join(line for line in text[cut:].split("\n") if line not in seen)
