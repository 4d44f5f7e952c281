"""Token windows for calibration and for perplexity.

* The papers' protocol (GPTQ, OmniQuant, AffineQuant, QLLM): a corpus is tokenized once, as a whole, with the special
  tokens that the tokenizer adds; calibration windows start at ``randint(0, tokens - length - 1)`` and may overlap,
  evaluation windows are consecutive. Rejected: padding and attention masks; every window is full.
* ``builtin`` comes from a published package, for machines without access to a hub; it is not WikiText-2. The first
  80 % is for calibration, the last 20 % for evaluation, without its long lines that occur in both (one C4 page).
  Calibration alternates Wikipedia and C4, so that consecutive windows contain both; evaluation uses Wikipedia alone,
  because a mean over two kinds of text says less than either.
* A path gives the same text to both functions; to keep them separate, give two files.
* Hub data sets are optional and read in one function, from files that need no remote code.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.checkpoints import pypi
from lowbit.errors import LowbitError, MissingExtra, check_least, unknown
from lowbit.paths import user_path
from lowbit.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer

C4_WINDOWS = 256  # the papers' number of evaluation windows on C4
TRIES = 10_000  # documents drawn for one C4 window before giving up
REPEATED = 100  # characters from which a line that occurs in both parts counts as repeated text
SUFFIXES = (".txt", ".raw", ".utf8", ".md", ".jsonl", ".parquet")
PATHS = f"a path ending in {', '.join(SUFFIXES)}"


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids, and their origin."""

    ids: Tensor  # (windows, length) int64
    corpus: str  # label for reports; for a file its name without folders
    hash: str  # SHA-256 over shape and ids as little-endian int64
    seed: int | None = None  # of the draw of windows; None for evaluation


@dataclass(frozen=True)
class HubText:
    """A data set on the hub; pairs are for (calibration, evaluation); ``joint`` joins documents if given."""

    repo: str
    column: str
    joint: str | None
    splits: tuple[str, str]
    files: tuple[str, str] | None = None
    revision: str | None = None
    config: str | None = None


_PTB = ("penn_treebank/train/0000.parquet", "penn_treebank/test/0000.parquet")  # the main revision is a script
_C4 = ("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz")
HUB = {
    "wikitext2": HubText("Salesforce/wikitext", "text", "\n\n", ("train", "test"), config="wikitext-2-raw-v1"),
    "ptb": HubText("ptb-text-only/ptb_text_only", "sentence", " ", ("train", "test"), _PTB, "refs/convert/parquet"),
    "c4": HubText("allenai/c4", "text", None, ("train", "validation"), _C4),
}
BUILTIN = {  # text: SHA-256 of its file
    "wiki": "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
    "c4": "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
}
NAMES = ("builtin", *(f"builtin:{name}" for name in BUILTIN), *HUB)


def corpus_name(given: str) -> str:
    """A corpus's name in its own spelling, whatever its case; anything else, such as a path, as given.

    >>> corpus_name("WikiText2"), corpus_name("./C4.txt")
    ('wikitext2', './C4.txt')
    """
    return next((name for name in (*NAMES, "self") if name == given.casefold()), given)


def calibration(
    corpus: str,
    tokenizer: Tokenizer,
    n: int,
    length: int,
    seed: int,
    *,
    cache: Path | None = None,
    sampler: Callable[[int, int, int], Tensor] | None = None,
) -> Tokens:
    """``n`` windows of ``length`` tokens at random offsets from ``random.Random(seed)``.

    ``corpus`` is one of ``NAMES``, a path, or ``self`` (then ``sampler(n, length, seed)`` returns the ids).
    ``builtin`` alternates its two texts; ``c4`` draws a document, then an offset in it. ``cache`` is the folder for
    the built-in text; hub data sets are in the hub's own cache. Raises ``LowbitError`` for an unknown name, an
    unreadable file, a text shorter than one window and sizes below 1 (``length``: 2), ``MissingExtra`` for a missing
    package.
    Ten tokens 0..9 with ``n=2, length=3, seed=0``: the offsets are drawn as 6 and 3: ``[[6, 7, 8], [3, 4, 5]]``.
    """
    _check_sizes(n=n, length=length)
    if (corpus := corpus_name(corpus)) == "self":
        if sampler is None:
            raise LowbitError("data 'self' is sampled from a model, and none is given: give a text")
        return _tokens(sampler(n, length, seed).to("cpu", torch.int64).view(n, length), "self", seed)
    label, texts = _open(corpus, 0, cache)
    rng = random.Random(seed)
    if corpus in HUB and HUB[corpus].joint is None:
        ids = _draw(texts, tokenizer, n, length, rng, label)
    else:
        corpora = [_token_ids(text, tokenizer, length, label) for text in texts]
        ids = torch.stack([_window(corpora[i % len(corpora)], length, rng) for i in range(n)])
    return _tokens(ids, label, seed)


def evaluation(
    corpus: str, tokenizer: Tokenizer, length: int, tokens: int | None = None, *, cache: Path | None = None
) -> Tokens:
    """Consecutive windows of ``length`` tokens without overlap; an incomplete last window is dropped.

    ``tokens`` limits the total, rounded down to whole windows; the remaining windows do not change. ``builtin`` is
    its Wikipedia part; ``c4`` the papers' 256 windows, each at a random offset of a random document, drawn with
    ``random.Random(0)``. Names, paths and errors as in ``calibration``; ``self`` is an error.
    Ten tokens 0..9 with ``length=3``: ``[[0, 1, 2], [3, 4, 5], [6, 7, 8]]``; with ``tokens=7`` the first two.
    """
    _check_sizes(length=length)
    if tokens is not None and tokens < length:
        raise LowbitError(f"{tokens} tokens given, one window needs {length}: give more tokens or less length")
    if (corpus := corpus_name(corpus)) == "self":
        raise LowbitError("data 'self' is for calibration only: evaluate on a text, for example 'builtin'")
    label, texts = _open(corpus, 1, cache)
    if corpus in HUB and HUB[corpus].joint is None:
        count = C4_WINDOWS if tokens is None else min(C4_WINDOWS, tokens // length)
        ids = _draw(texts, tokenizer, count, length, random.Random(0), label)
    else:
        corpus_ids = _token_ids(texts[0], tokenizer, length, label)
        count = min(len(corpus_ids), tokens or len(corpus_ids)) // length
        ids = corpus_ids[: count * length].view(count, length).clone()
    return _tokens(ids, label)


def self_sample(model: Model, tokenizer: Tokenizer, n: int, length: int, seed: int, batch: int = 16) -> Tensor:
    """Text sampled from a causal language model: ``(n, length)`` int64 ids on the CPU.

    A row starts with BOS (with a random token where there is none) and continues at temperature 1. Special tokens,
    EOS among them, are not drawn, so that rows are full. Token ``t`` of row ``i`` is where the cumulative
    distribution exceeds ``u[i, t]`` of one seeded float64 draw: ``batch`` only sets how many rows run at once, and
    the global generator is not used. With probabilities ``[0.5, 0.25, 0.25]`` a draw of 0.6 selects token 1. Raises
    ``LowbitError`` for sizes below 1 (``length``: 2), a ``length`` beyond the model's positions and non-finite
    output. ``model`` is left in eval mode.
    """
    _check_sizes(n=n, length=length, batch=batch)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise LowbitError(f"length {length} given; the model has {limit} positions: give a shorter length")
    uniform = torch.rand(n, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    eos = model.generation_config.eos_token_id
    special = {*tokenizer.all_special_ids, *(eos if isinstance(eos, list) else [eos])}
    size = min(len(tokenizer), model.get_output_embeddings().weight.shape[0])
    allowed = torch.tensor([i for i in range(size) if i not in special])
    model.eval()
    return torch.cat([_sample(model, draws, allowed, tokenizer.bos_token_id) for draws in uniform.split(batch)])


@torch.no_grad()
def _sample(model: Model, uniform: Tensor, allowed: Tensor, bos: int | None) -> Tensor:
    ids = torch.empty(uniform.shape, dtype=torch.int64)
    ids[:, 0] = allowed[(uniform[:, 0] * len(allowed)).long()] if bos is None else bos
    cache = None
    for step in track(range(1, uniform.shape[1]), f"sampling {len(ids)} texts"):
        out = model(input_ids=ids[:, step - 1 : step].to(model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        cdf = out.logits[:, -1].cpu().double()[:, allowed].softmax(-1).cumsum(-1)
        if not bool(cdf.isfinite().all()):
            raise LowbitError(f"the model's output is not finite at token {step}: give a text instead of 'self'")
        position = torch.searchsorted(cdf, uniform[:, step : step + 1] * cdf[:, -1:], right=True)
        ids[:, step] = allowed[position[:, 0].clamp(max=len(allowed) - 1)]
    return ids


def _tokens(ids: Tensor, corpus: str, seed: int | None = None) -> Tokens:
    raw = torch.cat([torch.tensor(ids.shape), ids.flatten()]).numpy().astype("<i8").tobytes()
    return Tokens(ids, corpus, hashlib.sha256(raw).hexdigest(), seed)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        unit = "tokens in a window" if name == "length" else "windows"
        check_least(name, size, 2 if name == "length" else 1, f"give the number of {unit}")


def _encode(tokenizer: Tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _token_ids(text: str, tokenizer: Tokenizer, length: int, label: str) -> Tensor:
    ids = _encode(tokenizer, text)
    if len(ids) < length:
        raise LowbitError(f"{label} has {len(ids)} tokens, a window needs {length}: give more text or less length")
    return ids


def _window(ids: Tensor, length: int, rng: random.Random) -> Tensor:
    start = rng.randint(0, max(len(ids) - length - 1, 0))
    return ids[start : start + length]


def _draw(texts: Sequence[str], tokenizer: Tokenizer, n: int, length: int, rng: random.Random, label: str) -> Tensor:
    windows = []
    for _ in track(range(n), f"drawing from {label}"):
        drawn = (_encode(tokenizer, rng.choice(texts)) for _ in range(TRIES if len(texts) else 0))
        ids = next((ids for ids in drawn if len(ids) > length), None)
        if ids is None:
            raise LowbitError(f"{label}: no document of more than {length} tokens found: give a shorter length")
        windows.append(_window(ids, length, rng))
    return torch.stack(windows)


def _open(corpus: str, part: int, cache: Path | None) -> tuple[str, Sequence[str]]:
    """Label and texts of a corpus; ``part`` 0 is for calibration, 1 for evaluation."""
    if corpus in NAMES and corpus.startswith("builtin"):
        names = [corpus[8:]] if ":" in corpus else (["wiki", "c4"], ["wiki"])[part]
        label = f"builtin:{'+'.join(names)} ({('first 80', 'last 20')[part]} %)"
        return label, [_builtin(name, cache)[part] for name in names]
    if corpus in HUB:
        hub = HUB[corpus]
        documents, label = hub_documents(hub, part), f"{corpus}/{hub.splits[part]}"
        return label, documents if hub.joint is None else [hub.joint.join(documents)]
    if Path(corpus).suffix or Path(corpus).name != corpus:
        return Path(corpus).name, ["\n\n".join(_read(user_path(corpus)))]
    raise LowbitError(f"{unknown('data', corpus, NAMES if part else (*NAMES, 'self'))}; or {PATHS}")


def _builtin(name: str, cache: Path | None) -> tuple[str, str]:
    """The first 80 % and the last 20 % of a built-in text, cut after a line."""
    raw = pypi.read_member(pypi.TEXTS, f"exllamav2/conversion/standard_cal_data/{name}.utf8", cache)
    if (digest := hashlib.sha256(raw).hexdigest()) != BUILTIN[name]:
        raise LowbitError(f"{name}.utf8 has SHA-256 {digest}, expected {BUILTIN[name]}: empty the wheel cache")
    text = "\n".join(line for line in raw.decode().split("\n") if not line.startswith(("<doc ", "</doc>")))
    cut = text.index("\n", len(text) * 4 // 5) + 1
    seen = {line for line in text[:cut].split("\n") if len(line) >= REPEATED}
    return text[:cut], "\n".join(line for line in text[cut:].split("\n") if line not in seen)


def hub_documents(hub: HubText, part: int) -> Sequence[str]:
    """The documents of a split (``part`` 0: calibration, 1: evaluation), read when indexed."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data", f"the data set {hub.repo}") from error
    split = hub.splits[part]
    options = {"data_files": {split: hub.files[part]}} if hub.files else {}
    try:  # no checks: a single file does not have the size that the data set states
        rows = datasets.load_dataset(
            hub.repo, hub.config, split=split, revision=hub.revision, verification_mode="no_checks", **options
        )
        documents: Sequence[str] = rows[hub.column]
    except Exception as error:  # datasets, the hub client and httpx share no base class
        reason = "the hub cannot be reached" if isinstance(error, ConnectionError) else "loading failed"
        raise LowbitError(f"cannot load {hub.repo}: {reason} ({error!r}); give 'builtin' or {PATHS}") from error
    return documents


def _read(path: Path) -> list[str]:
    """The documents in a file: the whole of a plain text, the field or column "text" of the others."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LowbitError(f"'{path}' is not a supported text file: give {PATHS}, or {', '.join(NAMES)}")
    try:
        if suffix == ".parquet":
            return _parquet_texts(path)
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LowbitError(f"cannot read '{path}': {error.strerror or error}; give {PATHS}") from error
    except UnicodeDecodeError as error:
        raise LowbitError(f"'{path}' is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
    return _json_texts(text, path) if suffix == ".jsonl" else [text]


def _json_texts(text: str, path: Path) -> list[str]:
    documents = []
    for number, line in ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()):
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            document = None
        if not isinstance(document, str):
            raise LowbitError(f"'{path}' line {number} is not a JSON object with a \"text\": fix or remove it")
        documents.append(document)
    return documents


def _parquet_texts(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", "a .parquet file") from error
    try:
        documents: list[str] = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except ArrowException as error:
        raise LowbitError(f"'{path}' has no readable column \"text\": {str(error).splitlines()[0]}") from error
    if not all(isinstance(document, str) for document in documents):
        raise LowbitError(f"'{path}' has a row without a string in the column \"text\": remove such rows")
    return documents
