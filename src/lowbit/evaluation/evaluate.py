"""Perplexity of a float model or of a run folder, read block by block."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from lowbit.checkpoints.resolve import Source, load_tokenizer, resolve
from lowbit.data.text import Data, corpora, evaluation
from lowbit.data.windows import Bos, Tokens, special_before
from lowbit.distributed.exchange import first_then_others, from_everyone
from lowbit.distributed.job import joined
from lowbit.distributed.share import own_items
from lowbit.distributed.world import ONE, within
from lowbit.errors import LowbitError
from lowbit.evaluation.ratios import Ratios, ratios_of
from lowbit.evaluation.texts import calibrated_on, default_texts
from lowbit.metrics.perplexity import perplexity_of, scored
from lowbit.models.device import check_device
from lowbit.models.validate import check_ids
from lowbit.runs.agreement import check_alone_or_shared, check_same_work
from lowbit.runs.manifest import manifest_of
from lowbit.runs.streamed_model import StreamedModel, batches_of
from lowbit.torch_state import own_torch_state


@dataclass(frozen=True)
class Reference:
    """The float model beside which a run was measured.

    Attributes:
        model: its name.
        fingerprint: digest of its weights, as in the identity of its runs.
        perplexity: by data name.
    """

    model: str
    fingerprint: str
    perplexity: dict[str, float]


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
        calibrated: by data name, whether the run was calibrated on this kind of text; ``None``: not known, or a float
            model.
        reference: the float model, where it was given.
        ratios: of the perplexities to the reference's.
        device, dtype: where and in which precision the models ran.
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
    calibrated: dict[str, bool | None] = field(default_factory=dict)
    reference: Reference | None = None
    ratios: Ratios | None = None
    device: str = "cpu"
    dtype: str = "float32"


@own_torch_state
@joined()
def evaluate(
    model: str | Path,
    data: Data | None = None,
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
    reference: str | Path | None = None,
) -> Evaluated:
    """Perplexity of a float model or of a run folder, read block by block; several texts share one pass.

    The processes that torchrun started share the windows, and all of them get the result that one process gets.

    Args:
        model: as for ``quantize``, or a run folder.
        data: one or several of ``builtin`` (its Wikipedia text) or ``builtin:`` with a kind of text, ``wikitext2``,
            ``ptb``, ``c4`` or a file; or a list of texts. By default Wikipedia, and a built-in kind of text that a
            run was not calibrated on.
        length: tokens per window. Perplexities at different lengths are not comparable.
        tokens: maximum number of tokens of each text; all by default.
        bos: what a window starts with: ``auto``, the special tokens that the tokenizer puts before a text; ``never``,
            none; ``stream``, the papers' protocol, where the text has them once. See ``docs/data.md``.
        device, dtype, revision, allow_pickle, trust_remote_code: as for ``quantize``.
        target: runtime whose quantization of inputs is simulated, or ``float``; by default the run's target.
        reference: the float model, measured on the same tokens: gives the ratios of the perplexities.

    Raises:
        LowbitError: a model or a text that cannot be read, or a reference with another tokenizer or with a manifest.
    """
    began = time.monotonic()
    torch_dtype = check_device(device, dtype)
    check_alone_or_shared(device)
    find = partial(resolve, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    source = first_then_others(lambda: find(str(model), revision=revision))
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    exact = None
    if reference is not None:
        exact = first_then_others(lambda: find(str(reference)))
        _check_reference(str(model), tokenizer.get_vocab(), str(reference), exact, trust_remote_code)
    manifest = manifest_of(source.folder)
    calibration = manifest.identity.data if manifest else None
    given = default_texts([calibration] if calibration else []) if data is None else corpora(data)
    windows = first_then_others(
        lambda: {str(corpus): evaluation(corpus, tokenizer, length, tokens, bos=bos) for corpus in given}
    )
    _check_same(source, exact, windows, {"dtype": dtype, "target": target})
    with within(ONE):
        streamed = StreamedModel(source.folder, device, torch_dtype, trust_remote_code, target)
        other = None if exact is None else StreamedModel(exact.folder, device, torch_dtype, trust_remote_code)
    _check_windows(streamed, windows, source.folder)
    if other is not None and exact is not None:
        _check_windows(other, windows, exact.folder)
    results = _perplexities(streamed, windows)
    beside = None
    if exact is not None and other is not None:
        there = _perplexities(other, windows)
        beside = Reference(str(reference), exact.identity, there)
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
        manifest.bits_per_weight if manifest else None,
        source.identity,
        {name: calibrated_on(text.kinds[0], calibration) for name, text in windows.items()},
        beside,
        ratios_of(results, beside.perplexity) if beside else None,
        device,
        dtype,
    )


def _check_reference(
    model: str, vocabulary: Mapping[str, int], reference: str, exact: Source, trust_remote_code: bool
) -> None:
    """Refuse a reference whose perplexities say nothing about the model's."""
    if manifest_of(exact.folder) is not None:
        raise LowbitError(f"--reference {reference} is a run folder: give the float model that the run was made from")
    if load_tokenizer(exact.folder, trust_remote_code).get_vocab() != vocabulary:
        raise LowbitError(
            f"--reference {reference} and {model} have different tokenizers: give the float model that the run was "
            "made from"
        )


def _check_windows(streamed: StreamedModel, windows: Mapping[str, Tokens], folder: Path) -> None:
    """Refuse texts that a model cannot read, before any model has read one."""
    for text in windows.values():
        check_ids(text.ids, streamed.skeleton, folder)
        streamed.check_length(text.ids.shape[1])


def _perplexities(streamed: StreamedModel, windows: Mapping[str, Tokens]) -> dict[str, float]:
    """A model's perplexity on each text, in one pass over its blocks; the processes of a job share the batches."""
    names = list(windows)
    first = [text.first for text in windows.values()]
    own = own_items(batches_of([text.ids for text in windows.values()]))
    with within(ONE):
        sums = [(which, *scored(ids, logits, first[which])) for which, ids, logits in streamed.logits_of(own)]
    everyones = [one for process in from_everyone(sums) for one in process]
    return {
        names[which]: perplexity_of((loss, count) for _, loss, count in group)
        for which, group in groupby(everyones, key=lambda one: one[0])
    }


def _check_same(
    source: Source, exact: Source | None, windows: Mapping[str, Tokens], facts: Mapping[str, Any]
) -> None:
    """Refuse processes with other models, texts or settings."""
    models = {"model": source.identity, "reference": None if exact is None else exact.identity}
    check_same_work({**models, **facts, **{f"text {name}": text.hash for name, text in windows.items()}})


def bits_of(folder: Path) -> float | None:
    """A run folder's effective bits per weight; ``None`` for a float model."""
    manifest = manifest_of(folder)
    return manifest.bits_per_weight if manifest else None
