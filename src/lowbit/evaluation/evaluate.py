"""Perplexity of a float model or of a run folder, read block by block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lowbit.checkpoints.resolve import load_tokenizer, resolve
from lowbit.data.text import corpus_name, evaluation
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
        tokens: number of scored tokens, by data name.
        length: tokens per window.
        seconds: wall time.
        data_hash: hash of the evaluated tokens, by data name.
        target: the target runtime whose quantization of inputs was simulated, if any.
        special: the special tokens, such as BOS, before a text (once, not before each window).
        scheme, bits_per_weight: of a run; ``None`` for a float model.
        fingerprint: digest of the model's weights, as in the identity of its runs.
    """

    perplexity: dict[str, float]
    tokens: dict[str, int]
    length: int
    seconds: float
    data_hash: dict[str, str]
    target: str | None = None
    special: str = ""
    scheme: str | None = None
    bits_per_weight: float | None = None
    fingerprint: str = ""


@own_torch_state
def evaluate(
    model: str,
    *,
    data: str | Sequence[str] = "builtin",
    length: int = 2048,
    tokens: int | None = None,
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
        data: one or several of ``builtin``, ``wikitext2``, ``ptb``, ``c4`` or a file.
        length: tokens per window. Perplexities at different lengths are not comparable.
        tokens: maximum number of tokens of each text; all by default.
        device, dtype, revision, allow_pickle, trust_remote_code: as for ``quantize``.
        target: runtime whose quantization of inputs is simulated, or ``float``; by default the run's target.
    """
    began = time.monotonic()
    torch_dtype = check_device(device, dtype)
    source = resolve(model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    names = list(dict.fromkeys(map(corpus_name, [data] if isinstance(data, str) else data)))
    windows = {name: evaluation(name, tokenizer, length, tokens) for name in names}
    streamed = StreamedModel(source.folder, device, torch_dtype, trust_remote_code, target)
    for text in windows.values():
        check_ids(text.ids, streamed.skeleton, source.folder)
    batches = streamed.logits_of([text.ids for text in windows.values()])
    results = {
        names[which]: perplexity((ids, logits) for _, ids, logits in group)
        for which, group in groupby(batches, key=lambda batch: batch[0])
    }
    return Evaluated(
        results,
        {name: text.ids.numel() for name, text in windows.items()},
        length,
        time.monotonic() - began,
        {name: text.hash for name, text in windows.items()},
        streamed.scheme.target if streamed.scheme else None,
        special_before(tokenizer),
        streamed.scheme.name if streamed.scheme else None,
        bits_of(source.folder),
        source.identity,
    )


def special_before(tokenizer: Any) -> str:
    """The special tokens, such as BOS, that a tokenizer puts before a text; may be empty."""
    with_, without = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next((i for i in range(len(with_)) if with_[i : i + len(without)] == without), 0)
    return str(tokenizer.decode(with_[:start]))


def bits_of(folder: Path) -> float | None:
    """A run folder's effective bits per weight; ``None`` for a float model."""
    manifest = manifest_of(folder)
    return manifest.bits_per_weight if manifest else None
