"""Perplexity of a float model or of a run folder, read block by block."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lowbit.checkpoints.resolve import load_tokenizer, resolve
from lowbit.data.text import Data, corpora, evaluation
from lowbit.data.windows import Bos, special_before
from lowbit.metrics.perplexity import perplexity
from lowbit.models.device import check_device
from lowbit.models.validate import check_ids
from lowbit.runs.manifest import manifest_of
from lowbit.runs.streamed_model import StreamedModel
from lowbit.torch_state import own_torch_state


@dataclass(frozen=True)
class Evaluated:
    """The result of ``evaluate``.

    Attributes:
        perplexity: by data name.
        tokens: number of tokens in windows, by data name.
        scored: number of those that are scored.
        length: tokens per window.
        seconds: wall time.
        data_hash: hash of the evaluated tokens, by data name.
        target: the target runtime whose quantization of inputs was simulated, if any.
        bos: what a window starts with: ``auto``, ``never`` or ``stream``.
        special: the special tokens, such as BOS, that the tokenizer puts before a text. ``auto`` puts them in front
            of each window, ``stream`` in front of the first one.
        scheme, bits_per_weight: of a run; ``None`` for a float model.
        fingerprint: digest of the model's weights, as in the identity of its runs.
    """

    perplexity: dict[str, float]
    tokens: dict[str, int]
    scored: dict[str, int]
    length: int
    seconds: float
    data_hash: dict[str, str]
    target: str | None = None
    bos: str = "auto"
    special: str = ""
    scheme: str | None = None
    bits_per_weight: float | None = None
    fingerprint: str = ""


@own_torch_state
def evaluate(
    model: str | Path,
    data: Data = "builtin",
    *,
    length: int = 2048,
    tokens: int | None = None,
    bos: Bos = "auto",
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    target: str | None = None,
) -> Evaluated:
    """Perplexity of a float model or of a run folder, read block by block; several texts share one pass.

    Args:
        model: as for ``quantize``, or a run folder.
        data: one or several of ``builtin``, ``wikitext2``, ``ptb``, ``c4`` or a file; or a list of texts.
        length: tokens per window. Perplexities at different lengths are not comparable.
        tokens: maximum number of tokens of each text; all by default.
        bos: what a window starts with: ``auto``, the special tokens that the tokenizer puts before a text; ``never``,
            none; ``stream``, the papers' protocol, where the text has them once. See ``docs/data.md``.
        device, dtype, revision, allow_pickle, trust_remote_code: as for ``quantize``.
        target: runtime whose quantization of inputs is simulated, or ``float``; by default the run's target.
    """
    began = time.monotonic()
    torch_dtype = check_device(device, dtype)
    source = resolve(str(model), revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    windows = {str(corpus): evaluation(corpus, tokenizer, length, tokens, bos=bos) for corpus in corpora(data)}
    names = list(windows)
    streamed = StreamedModel(source.folder, device, torch_dtype, trust_remote_code, target)
    for text in windows.values():
        check_ids(text.ids, streamed.skeleton, source.folder)
    batches = streamed.logits_of([text.ids for text in windows.values()])
    results = {
        names[which]: perplexity(((ids, logits) for _, ids, logits in group), windows[names[which]].first)
        for which, group in groupby(batches, key=lambda batch: batch[0])
    }
    return Evaluated(
        results,
        {name: text.ids.numel() for name, text in windows.items()},
        {name: text.scored for name, text in windows.items()},
        length,
        time.monotonic() - began,
        {name: text.hash for name, text in windows.items()},
        streamed.scheme.target if streamed.scheme else None,
        bos,
        special_before(tokenizer),
        streamed.scheme.name if streamed.scheme else None,
        bits_of(source.folder),
        source.identity,
    )


def bits_of(folder: Path) -> float | None:
    """A run folder's effective bits per weight; ``None`` for a float model."""
    manifest = manifest_of(folder)
    return manifest.bits_per_weight if manifest else None
