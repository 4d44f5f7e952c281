"""``lowbit.compare``: one or several runs against their float model, token by token."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoints.resolve import Source, load_tokenizer, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.data.text import evaluation
from lowbit.errors import LowbitError, check_least, check_seed
from lowbit.evaluation.generate import generate_text
from lowbit.metrics.kl import CONFIDENCE, RESAMPLES, listen, summary
from lowbit.models.device import check_device
from lowbit.models.validate import check_ids
from lowbit.runs.manifest import MANIFEST, manifest_of
from lowbit.runs.streamed_model import StreamedModel, passes

FORMAT = "lowbit-compare-1"


@dataclass(frozen=True)
class Compared:
    """What ``compare`` measured; ``to_dict`` is what ``--json`` prints and ``lowbit report --compare`` reads.

    Attributes:
        exact: the float model's name.
        fingerprint: digest of its weights, as a run of it has in its identity.
        runs: for each run its name, ``bits_per_weight``, ``size_bytes`` and its manifest's SHA-256 (``None`` for a
            folder that is no run).
        protocol: what a figure depends on: ``length`` of a window, ``seed``, ``resamples`` and ``confidence`` of the
            interval, ``device``, ``dtype``.
        texts: by data name: ``corpus``, ``tokens``, ``windows``, ``data_hash``, the float model's ``perplexity`` and
            in ``runs``, in the runs' order, ``perplexity``, its ``ratio`` to the float model's with the interval
            ``ratio_low`` to ``ratio_high`` (``None`` for a single window), ``kl_mean`` and ``kl_p99`` in nats,
            ``top1_agreement`` (0 to 1) and ``block_error``: for each block the mean over tokens of
            ``||y - y_float||^2 / ||y_float||^2``, both models running from their own embeddings.
        generations: ``prompt``, ``float`` and ``runs``: greedy continuations; ``None`` without a prompt.
        seconds: wall time.
    """

    exact: str
    fingerprint: str
    runs: list[dict[str, Any]]
    protocol: dict[str, Any]
    texts: dict[str, dict[str, Any]]
    generations: dict[str, Any] | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the format's name."""
        return {"format": FORMAT, **asdict(self)}


def compare(
    exact: str,
    runs: str | Sequence[str],
    *,
    data: str | Sequence[str] = "builtin",
    length: int = 2048,
    tokens: int | None = None,
    seed: int = 0,
    prompt: str | None = None,
    new_tokens: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Compared:
    """Compare runs with their float model: KL divergence, top-1 agreement, perplexity, each block's error.

    The models walk over their blocks in step: one block of each is in memory. Only ``prompt`` loads whole models,
    one after the other.

    Args:
        exact: the float model, as for ``quantize``.
        runs: run folders (or other checkpoints of the same architecture and tokenizer).
        data, length, tokens: as for ``evaluate``.
        seed: draws the bootstrap's windows.
        prompt: text for all to continue greedily by ``new_tokens`` tokens at most.
        device, dtype, revision, allow_pickle, trust_remote_code: as for ``quantize``.

    Raises:
        LowbitError: models that do not compare, and everything that ``evaluate`` refuses.
    """
    began = time.monotonic()
    torch_dtype = check_device(device, dtype)
    folders = [runs] if isinstance(runs, str) else list(runs)
    _check_given(folders, seed, prompt, new_tokens)
    source = resolve(exact, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    sources = [resolve(run, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code) for run in folders]
    opened = _opened(exact, source, folders, sources, device, torch_dtype, trust_remote_code)
    names = [data] if isinstance(data, str) else list(dict.fromkeys(data))
    texts = _texts(opened, source, names, length, tokens, seed, [exact, *folders], trust_remote_code)
    del opened
    places = [source.folder, *(one.folder for one in sources)]
    told = None if prompt is None else _generations(places, prompt, new_tokens, trust_remote_code)
    facts = [_facts(name, one) for name, one in zip(folders, sources, strict=True)]
    protocol = {"resamples": RESAMPLES, "confidence": CONFIDENCE, "device": device, "dtype": dtype}
    protocol = {"length": length, "seed": seed, **protocol}
    return Compared(exact, source.identity, facts, protocol, texts, told, time.monotonic() - began)


def _check_given(folders: Sequence[str], seed: int, prompt: str | None, new_tokens: int) -> None:
    check_seed(seed)
    if prompt == "":
        raise LowbitError("--prompt is empty; give some text to continue, or leave it out")
    check_least("--new-tokens", new_tokens, 1, "give how many tokens may follow the prompt")
    if not folders:
        raise LowbitError("no run given; name at least one run folder behind the float model")
    if twice := [name for at, name in enumerate(folders) if name in folders[:at]]:
        raise LowbitError(f"{twice[0]} is given twice; name each run once")


def _opened(
    exact: str,
    source: Source,
    folders: Sequence[str],
    sources: Sequence[Source],
    device: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> list[StreamedModel]:
    """The float model and the runs, each checked against it."""
    if manifest_of(source.folder) is not None:
        raise LowbitError(f"{exact} is a run folder; give the float model first and run folders behind it")
    vocabulary = load_tokenizer(source.folder, trust_remote_code).get_vocab()
    opened = [StreamedModel(source.folder, device, dtype, trust_remote_code)]
    for name, one in zip(folders, sources, strict=True):
        model = StreamedModel(one.folder, device, dtype, trust_remote_code)
        _check_pair(exact, opened[0], name, model)
        if load_tokenizer(one.folder, trust_remote_code).get_vocab() != vocabulary:
            raise LowbitError(f"{name} has another tokenizer than {exact}: give runs of that float model")
        opened.append(model)
    return opened


def _texts(
    models: Sequence[StreamedModel],
    source: Source,
    data: Sequence[str],
    length: int,
    tokens: int | None,
    seed: int,
    names: Sequence[str],
    trust_remote_code: bool,
) -> dict[str, dict[str, Any]]:
    """What all models say of each text of ``data``; ``names`` are the models', for errors."""
    models[0].check_length(length)
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    windows = {name: evaluation(name, tokenizer, length, tokens) for name in data}
    for found in windows.values():
        check_ids(found.ids, models[0].skeleton, source.folder)
    ids = [found.ids.to(models[0].device) for found in windows.values()]
    groups = passes(ids, models[0].width * len(models))
    told = listen(models[0], models[1:], groups, len(ids))
    return {
        name: {
            "corpus": found.corpus,
            "tokens": found.ids.numel(),
            "data_hash": found.hash,
            **summary(one, seed, names),
        }
        for (name, found), one in zip(windows.items(), told, strict=True)
    }


def _check_pair(exact: str, ours: StreamedModel, name: str, theirs: StreamedModel) -> None:
    """Refuse two models of which no block or no token corresponds."""
    for what in ("architectures", "num_hidden_layers", "hidden_size", "vocab_size"):
        wanted, found = getattr(ours.config, what, None), getattr(theirs.config, what, None)
        if wanted != found:
            raise LowbitError(f"{name} has {what} {found}, {exact} has {wanted}: give runs of that float model")


def _facts(name: str, source: Source) -> dict[str, Any]:
    manifest = manifest_of(source.folder)
    content = (source.folder / MANIFEST).read_bytes() if manifest else b""
    return {
        "run": name,
        "bits_per_weight": manifest.bits_per_weight if manifest else None,
        "size_bytes": sum(path.stat().st_size for path in Checkpoint(source.folder).files),
        "manifest": hashlib.sha256(content).hexdigest() if manifest else None,
    }


def _generations(folders: Sequence[Path], prompt: str, tokens: int, trust_remote_code: bool) -> dict[str, Any]:
    said = [generate_text(folder, prompt, tokens, trust_remote_code) for folder in folders]
    return {"prompt": prompt, "tokens": tokens, "float": said[0], "runs": said[1:]}
