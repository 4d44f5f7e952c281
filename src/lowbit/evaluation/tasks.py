"""``lowbit.evaluate_tasks``: zero-shot tasks on a float model or a run, with cached results.

Each finished task is one small file in the cache, named by the digest of everything its scores depend on: the model's
weights and tokenizer, the documents, device, dtype, versions and lowbit's own code. An interrupted command resumes,
from any folder, and a command with additional tasks evaluates only these.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lowbit
from lowbit.checkpoints.identity import tokenizer_digest
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.partial import sweep
from lowbit.checkpoints.positions import positions_of
from lowbit.checkpoints.pypi import cache_dir, sha256_of
from lowbit.checkpoints.resolve import Source, load_tokenizer, resolve
from lowbit.checkpoints.writing import write_json
from lowbit.data.tasks import Documents, HubSet, documents, settle
from lowbit.data.windows import special_before
from lowbit.distributed.exchange import by_first, first_then_others, from_first
from lowbit.distributed.job import joined
from lowbit.distributed.world import ONE, within
from lowbit.errors import LowbitError, canonical, check_least, check_seed
from lowbit.evaluation.evaluate import bits_of
from lowbit.metrics.lm_eval import AVERAGES, CONFIGS, average, harness_model, harness_version, hub_set, measure
from lowbit.models.build import text_config
from lowbit.models.device import check_device
from lowbit.progress import say
from lowbit.quant.scheme import simulated_on
from lowbit.runs.agreement import check_alone_or_shared, check_same_work
from lowbit.runs.manifest import MANIFEST, manifest_of
from lowbit.runs.reading import run_scheme
from lowbit.runs.streamed_model import StreamedModel
from lowbit.runs.versions import versions
from lowbit.torch_state import own_torch_state

SETS = {**AVERAGES, "all": tuple(CONFIGS)}


@dataclass(frozen=True)
class TaskScores:
    """The result of ``evaluate_tasks``.

    Attributes:
        tasks: by lm-eval's name: ``metrics`` (``acc``, ``acc_norm`` from 0 to 1, ``perplexity``), their standard
            ``errors``, ``documents`` used out of ``total``, the task's ``version``, ``source`` and ``data_hash`` of
            the documents, ``seconds``.
        averages: ``qllm`` and ``affinequant``, each if all of its tasks were evaluated: ``tasks``, and the mean
            ``acc`` and ``acc_norm`` (``acc`` for tasks without ``acc_norm``).
        protocol: settings that the scores depend on: ``shots`` (0), ``special`` (tokens that the tokenizer puts
            before a question), ``limit``, ``seed``, ``device``, ``dtype``, ``lm_eval`` (its version),
            ``target``, ``scheme`` and ``bits_per_weight`` of a run.
        seconds: wall time.
        fingerprint: digest of the model's weights, as in the identity of its runs.
    """

    tasks: dict[str, dict[str, Any]]
    averages: dict[str, dict[str, Any]]
    protocol: dict[str, Any]
    seconds: float
    fingerprint: str


@own_torch_state
@joined()
def evaluate_tasks(
    model: str,
    tasks: str | Sequence[str],
    *,
    task_data: str = "auto",
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    target: str | None = None,
    fresh: bool = False,
) -> TaskScores:
    """Zero-shot accuracy of a float model or of a run folder, read block by block.

    The processes that torchrun started share the questions, and all of them get the result that one process gets.

    Args:
        model: as for ``quantize``, or a run folder.
        tasks: names of tasks, or ``qllm``, ``affinequant`` (the papers' five and six) or ``all``.
        task_data: ``hub``, ``package``, a folder with ``TASK.jsonl``, or ``auto``: the hub if it is reachable,
            else the package.
        limit: maximum number of documents of each task, drawn at random with ``seed``; all by default.
        device, dtype, revision, allow_pickle, trust_remote_code: as for ``quantize``.
        target: as for ``evaluate``.
        fresh: ignore cached results.

    Raises:
        LowbitError: an unknown task, unreadable documents, and everything that ``evaluate`` refuses; ``MissingExtra``
            without lm-eval.
    """
    began = time.monotonic()
    torch_dtype = check_device(device, dtype)
    names = task_names(tasks)
    _check_draw(limit, seed)
    harness = harness_version()
    check_alone_or_shared(device)
    origin = first_then_others(lambda: settle(task_data, names[0], HubSet(*hub_set(names[0]))))
    find = partial(resolve, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    source = first_then_others(lambda: find(model, revision=revision))
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    manifest = manifest_of(source.folder)
    scheme = simulated_on(run_scheme(manifest) if manifest else None, target)
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "limit": limit, "seed": seed}
    settings["target"] = scheme.target if scheme else None
    identity = {
        **_model_identity(source),
        **settings,
        "versions": {**versions(), "lm_eval": harness},
        "code": package_digest(),
    }
    check_same_work({**identity, "tasks": names})
    lazy = _LazyModel(lambda: StreamedModel(source.folder, device, torch_dtype, trust_remote_code, target), tokenizer)
    rows = {}
    for name in names:
        task_documents = first_then_others(partial(documents, name, origin, HubSet(*hub_set(name)), limit, seed))
        facts = {"task": name, "source": task_documents.source, "data_hash": task_documents.hash}
        rows[name] = _cached({**identity, **facts}, partial(lazy.measure, name, task_documents), fresh)
    scores = {name: row["metrics"] for name, row in rows.items()}
    means = {name: average(scores, members) for name, members in AVERAGES.items()}
    protocol = {"shots": 0, "special": special_before(tokenizer), **settings, "lm_eval": harness}
    protocol |= {"scheme": scheme.name if scheme else None, "bits_per_weight": bits_of(source.folder)}
    averages = {name: {"tasks": list(AVERAGES[name]), **mean} for name, mean in means.items() if mean}
    return TaskScores(rows, averages, protocol, time.monotonic() - began, source.identity)


def task_names(given: str | Sequence[str]) -> list[str]:
    """Task names without duplicates, with task sets and comma-separated names expanded.

    >>> task_names("boolq,qllm")
    ['boolq', 'piqa', 'arc_easy', 'arc_challenge', 'hellaswag', 'winogrande']
    """
    requested = [word.strip() for text in ([given] if isinstance(given, str) else given) for word in text.split(",")]
    names: list[str] = []
    for word in filter(None, requested):
        word = canonical("task", word, [*CONFIGS, *SETS])
        names += SETS.get(word, (word,))
    if not names:
        raise LowbitError(f"no task given; known: {', '.join([*CONFIGS, *SETS])}")
    return list(dict.fromkeys(names))


class _LazyModel:
    """A model that is opened when the first task needs it."""

    def __init__(self, open_: Callable[[], StreamedModel], tokenizer: Any) -> None:
        self._open, self._tokenizer = open_, tokenizer
        self._model: StreamedModel | None = None

    def measure(self, task: str, documents: Documents) -> dict[str, Any]:
        """One task's row of ``TaskScores.tasks``."""
        began = time.monotonic()
        with within(ONE):
            self._model = self._model or self._open()
        positions = (positions_of(text_config(self._model.config)) or sys.maxsize) - self._model.skeleton.prefix
        lm = harness_model(self._model, self._tokenizer, positions, task)
        scores = measure(task, documents.rows, lm)
        facts = {"total": documents.total, "source": documents.source, "data_hash": documents.hash}
        return {**asdict(scores), **facts, "seconds": time.monotonic() - began}


def _cached(identity: dict[str, Any], measured: Callable[[], dict[str, Any]], fresh: bool) -> dict[str, Any]:
    """The result of ``measured()``, cached by ``identity``; the first process of a job has the cache."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "tasks" / f"{name}.json"
    if not fresh and (stored := from_first(lambda: _stored(path))) is not None:
        say(f"{identity['task']}: cached result read from {path}")
        return stored
    row: dict[str, Any] = measured()
    by_first(lambda: _keep(path, identity, row))
    return row


def _stored(path: Path) -> dict[str, Any] | None:
    """A task's row in the cache; ``None``: there is none."""
    if not path.exists():
        return None
    stored: dict[str, Any] = read_json(path).get("row", {})
    if not all(isinstance(stored.get(name), dict) for name in ("metrics", "errors")):
        raise LowbitError(f"{path} is not a task result: delete it")
    metrics = {name: math.inf if value is None else value for name, value in stored["metrics"].items()}
    errors = {name: math.nan if value is None else value for name, value in stored["errors"].items()}
    return {**stored, "metrics": metrics, "errors": errors}


def _keep(path: Path, identity: dict[str, Any], row: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        # JSON has no infinity (a diverged model's perplexity) and no NaN (the error of one document).
        plain = {
            name: {key: value if math.isfinite(value) else None for key, value in row[name].items()}
            for name in ("metrics", "errors")
        }
        write_json(path, {"identity": identity, "row": {**row, **plain}})
    except (OSError, LowbitError) as error:  # the scores took minutes or hours, and are worth more than the cache
        say(f"{identity['task']}: the result is not cached ({error}); set LOWBIT_CACHE to a folder you may write")


def _model_identity(source: Source) -> dict[str, str | None]:
    """Digests of weights and config, of the tokenizer's files and, for a run, of the manifest (formats, ops)."""
    manifest = source.folder / MANIFEST
    return {
        "fingerprint": source.identity,
        "tokenizer": tokenizer_digest(source.folder),
        "manifest": sha256_of(manifest) if manifest.exists() else None,
    }


@functools.cache
def package_digest() -> str:
    """Digest of the whole package's sources, which may change without a new version number.

    A score depends on formats, blocks and loading as much as on this package of it.
    """
    root = Path(lowbit.__file__).parent
    sources = "\n".join(f"{path.relative_to(root)} {sha256_of(path)}" for path in sorted(root.rglob("*.py")))
    return hashlib.sha256(sources.encode()).hexdigest()


def _check_draw(limit: int | None, seed: int) -> None:
    if limit is not None:
        check_least("--limit", limit, 1, "give a number of documents, or leave it out for all")
    check_seed(seed)
