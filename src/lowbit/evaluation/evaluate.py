"""Perplexity of a float model or of a run folder, read block by block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lowbit.checkpoints.resolve import load_tokenizer, resolve
from lowbit.data.text import evaluation
from lowbit.metrics.perplexity import perplexity
from lowbit.models.device import check_device
from lowbit.models.validate import check_ids
from lowbit.runs.manifest import manifest_of
from lowbit.runs.streamed_model import StreamedModel


@dataclass(frozen=True)
class Evaluated:
    """What ``evaluate`` measured.

    Attributes:
        perplexity: by data name.
        tokens: how many tokens of each were scored, by data name.
        length: tokens in a window.
        seconds: wall time.
        data_hash: hash of the evaluated tokens, by data name.
        target: the runtime whose quantization of inputs was simulated, if any.
        special: the special tokens that the tokenizer puts before a text (once, not before each window).
        scheme, bits_per_weight: a run's; ``None`` for a float model.
        fingerprint: digest of the model's weights, as a run of it has in its identity.
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
        length: tokens in a window. Perplexities of different lengths do not compare.
        tokens: how many tokens of each text at most; all by default.
        device, dtype, revision, allow_pickle, trust_remote_code: as for ``quantize``.
        target: a runtime whose quantization of inputs is simulated, or ``float``; by default the one of the run.
    """
    began = time.monotonic()
    torch_dtype = check_device(device, dtype)
    source = resolve(model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    names = [data] if isinstance(data, str) else list(dict.fromkeys(data))
    windows = {name: evaluation(name, tokenizer, length, tokens) for name in names}
    streamed = StreamedModel(source.folder, device, torch_dtype, trust_remote_code, target)
    for found in windows.values():
        check_ids(found.ids, streamed.skeleton, source.folder)
    batches = streamed.logits_of([found.ids for found in windows.values()])
    results = {
        names[which]: perplexity((ids, logits) for _, ids, logits in some)
        for which, some in groupby(batches, key=lambda found: found[0])
    }
    return Evaluated(
        results,
        {name: found.ids.numel() for name, found in windows.items()},
        length,
        time.monotonic() - began,
        {name: found.hash for name, found in windows.items()},
        streamed.scheme.target if streamed.scheme else None,
        special_before(tokenizer),
        streamed.scheme.name if streamed.scheme else None,
        bits_of(source.folder),
        source.identity,
    )


def special_before(tokenizer: Any) -> str:
    """The special tokens, if any, that a tokenizer puts before a text."""
    with_, without = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next((i for i in range(len(with_)) if with_[i : i + len(without)] == without), 0)
    return str(tokenizer.decode(with_[:at]))


def bits_of(folder: Path) -> float | None:
    """A run folder's effective bits per weight; ``None`` for a float model."""
    manifest = manifest_of(folder)
    return manifest.bits_per_weight if manifest else None
