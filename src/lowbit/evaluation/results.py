"""Results stored with a run: what ``lowbit evaluate`` measured on its folder, in one file for ``lowbit report``.

An entry is plain data: ``on`` (the text or task), ``measure``, ``value`` (``None`` if not finite), ``error`` (its
standard error; ``None`` if there is none, or none that is finite), ``protocol`` (everything else that the value
depends on, except the model) and ``runtime`` (whose quantization of inputs was simulated, or ``None``). An entry
replaces one that differs from it in ``value`` and ``error`` only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from lowbit.checkpoints.identity import tokenizer_digest
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.lock import Locked, hold
from lowbit.checkpoints.partial import sweep
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError

EVALUATIONS = "lowbit-evaluations.json"
FORMAT = 1
WAIT = 30.0  # seconds for other processes to add their results, which takes milliseconds each
Entry = dict[str, Any]


def entry(
    on: str,
    measure: str,
    value: float | None,
    protocol: Mapping[str, Any],
    runtime: str | None = None,
    error: float | None = None,
) -> Entry:
    """One result; ``on`` is a task or one of ``labels_of``."""
    return {
        "on": on,
        "measure": measure,
        "value": _finite(value),
        "error": _finite(error),
        "protocol": dict(protocol),
        "runtime": runtime,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def results_of(printed: Mapping[str, Any]) -> tuple[str, list[Entry]]:
    """The model's fingerprint, and entries, from what ``lowbit evaluate --json`` prints.

    >>> result = {"perplexity": {"a.txt": 9.5}, "tokens": {"a.txt": 64}, "data_hash": {"a.txt": "0f"}, "length": 32}
    >>> results_of(result | {"bos": "auto", "dtype": "float32", "fingerprint": "f"})[1][0]["protocol"]
    {'tokens': 64, 'length': 32, 'bos': 'auto', 'hash': '0f'}
    """
    out, labels = [], labels_of(printed.get("perplexity", {}))
    for name, value in printed.get("perplexity", {}).items():
        protocol = text_protocol(
            printed["tokens"][name], printed["length"], printed["bos"], printed["data_hash"][name], printed["dtype"]
        )
        out.append(entry(labels[name], "perplexity", value, protocol, printed.get("target")))
    if tasks := printed.get("zero_shot"):
        return tasks["fingerprint"], [*out, *_accuracies(tasks)]
    return printed["fingerprint"], out


def labels_of(names: Iterable[str]) -> dict[str, str]:
    """What results on texts that were measured together are on, by the texts' names.

    A path is shortened to the file's name, and to its folders too where those tell several files of one name apart.

    >>> labels_of(["x/de/t.txt", "x/en/t.txt", "x/a.txt", "builtin:wiki"])
    {'x/de/t.txt': 'de/t.txt', 'x/en/t.txt': 'en/t.txt', 'x/a.txt': 'a.txt', 'builtin:wiki': 'builtin:wiki'}
    """
    parts = {name: Path(name).parts for name in names}
    return {name: _shortened(own, set(parts.values()) - {own}) for name, own in parts.items()}


def _shortened(own: tuple[str, ...], others: Iterable[tuple[str, ...]]) -> str:
    """The end of a path that none of the others has; all of it where another one ends in it."""
    depths = range(1, len(own) + 1)
    depth = next((n for n in depths if all(other[-n:] != own[-n:] for other in others)), len(own))
    return str(Path(*own[len(own) - depth :]))


def _accuracies(scores: Mapping[str, Any]) -> Iterator[Entry]:
    """Entries of tasks and of the papers' averages over tasks; accuracies in percent."""
    settings = scores["protocol"]
    sampling = {"limit": settings["limit"], "seed": settings["seed"]} if settings["limit"] is not None else {}
    common = {"shots": settings["shots"], **sampling, "special": settings["special"], "lm_eval": settings["lm_eval"]}
    common |= _precision(settings["dtype"])
    for task, row in scores["tasks"].items():
        protocol = {"documents": row["documents"], "version": row["version"], **common, "hash": row["data_hash"]}
        for measure, value in row["metrics"].items():
            unit, sign = (1, "") if measure == "perplexity" else (100, ", %")
            error = row["errors"].get(measure)
            scaled_error = None if error is None else unit * error
            scaled = None if value is None else unit * value  # JSON has null for what is not finite
            yield entry(task, f"{measure}{sign}", scaled, protocol, settings["target"], scaled_error)
    for name, mean in scores["averages"].items():
        digest = sha256(" ".join(scores["tasks"][task]["data_hash"] for task in mean["tasks"]).encode()).hexdigest()
        for measure in ("acc", "acc_norm"):
            on, protocol = f"mean of {len(mean['tasks'])} tasks ({name})", {**common, "hash": digest}
            yield entry(on, f"{measure}, %", 100 * mean[measure], protocol, settings["target"])


def text_protocol(tokens: int, length: int, bos: str, digest: str, dtype: str) -> dict[str, Any]:
    """Protocol of a result on a text: its tokens, tokens per window, what windows start with, the tokens' digest.

    >>> text_protocol(64, 32, "auto", "0f", "bfloat16")
    {'tokens': 64, 'length': 32, 'bos': 'auto', 'dtype': 'bfloat16', 'hash': '0f'}
    """
    return {"tokens": tokens, "length": length, "bos": bos, **_precision(dtype), "hash": digest}


def _precision(dtype: str) -> dict[str, str]:
    """A protocol's part on precision; none for float32, so that entries stored before it was told stay comparable."""
    return {} if dtype == "float32" else {"dtype": dtype}


def merge_entries(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """``old`` updated with ``new``, in a stable order."""
    by_question = {}
    for result in [*old, *new]:
        question = {key: value for key, value in result.items() if key not in ("value", "error")}
        by_question[json.dumps(question, sort_keys=True)] = result
    return [by_question[name] for name in sorted(by_question)]


def keep(folder: Path, fingerprint: str, entries: Iterable[Entry]) -> None:
    """Merge entries into the run folder's file; results of other weights or another tokenizer are dropped.

    Processes that measure the same run at once take turns, so that none overwrites what another has just added.

    Raises:
        LowbitError: the file is broken, or the folder cannot be written.
    """
    path = folder / EVALUATIONS
    try:
        with hold(path.with_name(f"{EVALUATIONS}.lock"), wait=WAIT):
            sweep(folder, EVALUATIONS)
            results = merge_entries(kept(folder, fingerprint), entries)
            whose = {"fingerprint": fingerprint, "tokenizer": tokenizer_digest(folder)}
            write_json(path, {"format": FORMAT, **whose, "results": results})
    except Locked as error:
        raise LowbitError(f"{path} is in use by {error}: evaluate again once it has ended") from error
    except OSError as error:
        raise LowbitError(f"cannot write {path}: {error.strerror or error}") from error


def kept(folder: Path, fingerprint: str) -> list[Entry]:
    """Results stored in a run folder for weights with this fingerprint and the folder's tokenizer."""
    path = folder / EVALUATIONS
    if not path.exists():
        return []
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise LowbitError(f"{path} has format {content.get('format')!r}; this lowbit reads {FORMAT}: delete the file")
    if content.get("fingerprint") != fingerprint or content.get("tokenizer") != tokenizer_digest(folder):
        return []
    results = content.get("results")
    if not isinstance(results, list) or not all(map(_valid, results)):
        raise LowbitError(f"{path} is broken: delete the file and evaluate again")
    return results


def _valid(result: Any) -> bool:
    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("on", "measure"), (str,)),
        **dict.fromkeys(("value", "error"), (int, float, type(None))),
        "protocol": (dict,),
        "runtime": (str, type(None)),
    }
    return isinstance(result, dict) and all(isinstance(result.get(name, ...), kind) for name, kind in kinds.items())
