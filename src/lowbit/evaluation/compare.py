"""``lowbit.compare``: token-level comparison of one or several runs with their float model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoints.resolve import Source, load_tokenizer, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.data.text import Data, corpora, evaluation
from lowbit.data.windows import Bos, Tokens, special_before
from lowbit.distributed.exchange import first_then_others
from lowbit.distributed.job import joined
from lowbit.distributed.share import each, own_items
from lowbit.distributed.world import ONE, within
from lowbit.errors import LowbitError, check_least, check_seed
from lowbit.evaluation.generate import generate_text, prompt_ids
from lowbit.evaluation.ratios import Ratios, ratios_of
from lowbit.evaluation.texts import calibrated_on, default_texts
from lowbit.metrics.kl import CONFIDENCE, RESAMPLES, listen, of_everyone, summary
from lowbit.models.build import text_config
from lowbit.models.device import check_device
from lowbit.models.validate import check_ids
from lowbit.runs.agreement import check_alone_or_shared, check_same_work
from lowbit.runs.manifest import MANIFEST, manifest_of
from lowbit.runs.streamed_model import StreamedModel, batches_of, passes
from lowbit.torch_state import own_torch_state

FORMAT = "lowbit-compare-1"
NEW_TOKENS = 64  # after a prompt


@dataclass(frozen=True)
class Compared:
    """The result of ``compare``; ``--json`` prints ``to_dict``, and ``lowbit report --measured`` reads it.

    Attributes:
        exact: the float model's name.
        fingerprint: digest of its weights, as in the identity of its runs.
        runs: for each run its name, ``bits_per_weight``, ``size_bytes`` and its manifest's SHA-256 (``None`` if the
            folder is not a run).
        protocol: evaluation settings: ``length`` of a window, ``bos`` and ``special`` as in ``Evaluated``, ``seed``,
            ``resamples`` and ``confidence`` of the interval, ``device``, ``dtype``.
        texts: by data name: ``corpus``, ``kind`` (of text), ``tokens``, ``windows``, ``data_hash``, the float
            model's ``perplexity`` and in ``runs``, in the runs' order, ``perplexity``, its ``ratio`` to the float
            model's with the interval ``ratio_low`` to ``ratio_high`` (``None`` for a single window), ``kl_mean`` and
            ``kl_p99`` in nats, ``top1_agreement`` (0 to 1) and ``block_error``: for each block the mean over tokens
            of ``||y - y_float||^2 / ||y_float||^2``, each model running from its own embeddings.
        ratios: for each run the ratios of its perplexities, their mean and the worst; see ``Ratios``.
        calibrated: for each run, by data name, whether it was calibrated on this kind of text; ``None``: not known.
        generations: ``prompt``, ``float`` and ``runs``: greedy continuations; ``None`` without a prompt.
        seconds: wall time.
    """

    exact: str
    fingerprint: str
    runs: list[dict[str, Any]]
    protocol: dict[str, Any]
    texts: dict[str, dict[str, Any]]
    ratios: list[Ratios]
    calibrated: list[dict[str, bool | None]]
    generations: dict[str, Any] | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the format's name."""
        return {"format": FORMAT, **asdict(self)}


@own_torch_state
@joined()
def compare(
    exact: str | Path,
    runs: str | Path | Sequence[str | Path],
    *,
    data: Data | None = None,
    length: int = 2048,
    tokens: int | None = None,
    bos: Bos = "auto",
    seed: int = 0,
    prompt: str | None = None,
    new_tokens: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Compared:
    """Compare runs with their float model: KL divergence, top-1 agreement, perplexity, error of each block.

    The processes that torchrun started share the windows, and all of them get the result that one process gets.

    The models run block by block in lockstep, with one block of each in memory. Only ``prompt`` loads whole models,
    one at a time.

    Args:
        exact: the float model, as for ``quantize``.
        runs: run folders (or other checkpoints of the same architecture and tokenizer).
        data, length, tokens, bos: as for ``evaluate``; by default Wikipedia, and a built-in kind of text that none of
            the runs was calibrated on.
        seed: seed of the bootstrap.
        prompt: text that all models continue greedily by up to ``new_tokens`` tokens, by default 64.
        device, dtype, revision, allow_pickle, trust_remote_code: as for ``quantize``.

    Raises:
        LowbitError: incompatible models, and everything that ``evaluate`` refuses.
    """
    began = time.monotonic()
    torch_dtype = check_device(device, dtype)
    exact = str(exact)
    folders = [str(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    new_tokens = _check_arguments(folders, seed, prompt, new_tokens)
    check_alone_or_shared(device)
    find = partial(resolve, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    source = first_then_others(lambda: find(exact, revision=revision))
    sources = first_then_others(lambda: [find(run) for run in folders])
    with within(ONE):
        opened = _open_models(exact, source, folders, sources, device, torch_dtype, trust_remote_code)
    for model in opened:
        model.check_length(length)
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    if prompt is not None:
        for model, own in zip(opened, [source, *sources], strict=True):
            prompt_ids(own.folder, tokenizer, model.skeleton.text_config, model.skeleton.prefix, prompt, new_tokens)
    drawn = [manifest.identity.data if (manifest := manifest_of(run.folder)) else None for run in sources]
    given = default_texts(filter(None, drawn)) if data is None else corpora(data)
    windows = first_then_others(
        lambda: {str(corpus): evaluation(corpus, tokenizer, length, tokens, bos=bos) for corpus in given}
    )
    _check_same([source, *sources], windows, {"seed": seed, "dtype": dtype, "prompt": prompt, "new": new_tokens})
    texts = _texts(opened, source, windows, seed, [exact, *folders])
    del opened
    model_folders = [source.folder, *(run_source.folder for run_source in sources)]
    generations = None if prompt is None else _generations(model_folders, prompt, new_tokens, trust_remote_code)
    facts = [_facts(name, run_source) for name, run_source in zip(folders, sources, strict=True)]
    protocol = {"resamples": RESAMPLES, "confidence": CONFIDENCE, "device": device, "dtype": dtype}
    protocol = {"length": length, "bos": bos, "special": special_before(tokenizer), "seed": seed, **protocol}
    ratios = [
        ratios_of(
            {name: text["runs"][position]["perplexity"] for name, text in texts.items()},
            {name: text["perplexity"] for name, text in texts.items()},
        )
        for position in range(len(folders))
    ]
    calibrated = [{name: calibrated_on(text.kinds[0], own) for name, text in windows.items()} for own in drawn]
    seconds = time.monotonic() - began
    return Compared(exact, source.identity, facts, protocol, texts, ratios, calibrated, generations, seconds)


def _check_arguments(folders: Sequence[str], seed: int, prompt: str | None, new_tokens: int | None) -> int:
    """Refuse arguments that need no model to be wrong; returns the new tokens."""
    check_seed(seed)
    if prompt == "":
        raise LowbitError("--prompt is empty; give some text to continue, or leave it out")
    if new_tokens is not None and prompt is None:
        raise LowbitError(
            f"--new-tokens {new_tokens} given without --prompt: give the text to continue, or leave it out"
        )
    count = NEW_TOKENS if new_tokens is None else new_tokens
    check_least("--new-tokens", count, 1, "give how many tokens may follow the prompt")
    if not folders:
        raise LowbitError("no run given; name at least one run folder after the float model")
    if duplicates := [name for index, name in enumerate(folders) if name in folders[:index]]:
        raise LowbitError(f"{duplicates[0]} is given twice; name each run once")
    return count


def _open_models(
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
        raise LowbitError(f"{exact} is a run folder; give the float model first, then run folders")
    vocabulary = load_tokenizer(source.folder, trust_remote_code).get_vocab()
    opened = [StreamedModel(source.folder, device, dtype, trust_remote_code)]
    for name, run_source in zip(folders, sources, strict=True):
        model = StreamedModel(run_source.folder, device, dtype, trust_remote_code)
        _check_pair(exact, opened[0], name, model)
        if load_tokenizer(run_source.folder, trust_remote_code).get_vocab() != vocabulary:
            raise LowbitError(f"{name} and {exact} have different tokenizers: give runs of that float model")
        opened.append(model)
    return opened


def _texts(
    models: Sequence[StreamedModel],
    source: Source,
    windows: Mapping[str, Tokens],
    seed: int,
    names: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Figures of all models on each text; ``names`` of the models appear in errors."""
    for text in windows.values():
        check_ids(text.ids, models[0].skeleton, source.folder)
    ids = [text.ids.to(models[0].device) for text in windows.values()]
    groups = passes(own_items(batches_of(ids)), models[0].width * len(models))
    with within(ONE):
        own = listen(models[0], models[1:], groups, [text.first for text in windows.values()])
    records = of_everyone(own)
    return {
        name: {
            "corpus": text.corpus,
            "kind": text.kinds[0],
            "tokens": text.ids.numel(),
            "data_hash": text.hash,
            **summary(text_records, seed, names),
        }
        for (name, text), text_records in zip(windows.items(), records, strict=True)
    }


def _check_same(sources: Sequence[Source], windows: Mapping[str, Tokens], facts: Mapping[str, Any]) -> None:
    """Refuse processes with other models, texts or settings."""
    texts = {f"text {name}": text.hash for name, text in windows.items()}
    check_same_work({"models": [source.identity for source in sources], **facts, **texts})


def _check_pair(exact: str, ours: StreamedModel, name: str, theirs: StreamedModel) -> None:
    """Refuse two models whose blocks or tokens do not correspond."""
    for field in ("architectures", "num_hidden_layers", "hidden_size", "vocab_size"):
        parts = [m.config if field == "architectures" else text_config(m.config) for m in (ours, theirs)]
        expected, actual = (getattr(part, field, None) for part in parts)
        if expected != actual:
            raise LowbitError(f"{name} has {field} {actual}, {exact} has {expected}: give runs of that float model")


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
    outputs = each(folders, lambda folder: generate_text(folder, prompt, tokens, trust_remote_code))
    return {"prompt": prompt, "tokens": tokens, "float": outputs[0], "runs": outputs[1:]}
