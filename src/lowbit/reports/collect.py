"""Evaluation results of runs and their float models, from run folders and from output files of the commands.

A result belongs to the model whose weights have its fingerprint. A float model's perplexity therefore appears beside
every run made from it, and a file about other models is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.checkpoints.identity import fingerprint
from lowbit.checkpoints.json_file import read_json
from lowbit.errors import LowbitError
from lowbit.evaluation.compare import FORMAT as COMPARED
from lowbit.evaluation.results import Entry, entry, kept, labels_of, merge_entries, results_of, text_protocol
from lowbit.exporters.run import Run
from lowbit.reports.facts import FloatFacts
from lowbit.runs.manifest import MANIFEST

FIGURES = {"perplexity": "perplexity", "kl_mean": "KL mean, nats", "kl_p99": "KL 99 %, nats"}


@dataclass
class Measured:
    """Results of one run: entries as in ``lowbit.evaluation.results``, and each block's error by text."""

    scores: list[Entry] = field(default_factory=list)
    block_error: dict[str, list[float]] = field(default_factory=dict)


def measured_of(runs: Sequence[Run], files: Sequence[Path]) -> tuple[list[Measured], list[FloatFacts]]:
    """The results of each run, and the float models that have results.

    Args:
        runs: the runs; results that ``lowbit evaluate`` stored in their folders are read.
        files: output of ``lowbit evaluate --json`` or ``lowbit compare --json``.
    """
    pool = _Pool(runs)
    for file in files:
        pool.read(file)
    return pool.runs, [FloatFacts(name, whose, scores) for whose, (name, scores) in pool.floats.items()]


class _Pool:
    """Results by model."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.prints = [fingerprint(run.folder) for run in runs]
        self.manifests = [hashlib.sha256((run.folder / MANIFEST).read_bytes()).hexdigest() for run in runs]
        self.runs = [Measured(kept(run.folder, own)) for run, own in zip(runs, self.prints, strict=True)]
        self.runtimes = [run.subject.scheme.target for run in runs]  # ``compare`` simulates each run's own target
        identities = [run.manifest.identity for run in runs]
        self.models = {identity.fingerprint: identity.model for identity in identities}
        self.titles: dict[str, str] = {}  # the digest of the first text with a chart's heading
        self.floats: dict[str, tuple[str, list[Entry]]] = {}

    def read(self, file: Path) -> None:
        """Add the results of a file of either format."""
        content = read_json(file)
        reader = self._compared if content.get("format") == COMPARED else self._evaluated
        try:
            known = reader(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise LowbitError(
                f"{file} is not output of this version's 'lowbit evaluate --json' or 'lowbit compare --json'"
            ) from error
        if not known:
            raise LowbitError(f"{file} is about other models: give results of these runs or of their float model")

    def _evaluated(self, content: Mapping[str, Any]) -> bool:
        whose, entries = results_of(content)
        if reference := content.get("reference"):
            beside = {**content, "perplexity": reference["perplexity"], "target": None, "zero_shot": None}
            self._float(*results_of({**beside, "fingerprint": reference["fingerprint"]}))
        for run, own in zip(self.runs, self.prints, strict=True):
            if own == whose:
                run.scores = merge_entries(run.scores, entries)
        return self._float(whose, entries) or whose in self.prints

    def _float(self, whose: str, entries: Sequence[Entry]) -> bool:
        """Add entries of a float model if one of the runs was made from it; return whether it was."""
        if whose not in self.models:
            return False
        name, old = self.floats.get(whose, (self.models[whose], []))
        self.floats[whose] = (name, merge_entries(old, entries))
        return True

    def _compared(self, content: Mapping[str, Any]) -> bool:
        positions = [
            self.manifests.index(compared_run["manifest"]) if compared_run["manifest"] in self.manifests else None
            for compared_run in content["runs"]
        ]
        exact, how = [], content["protocol"]
        labels = labels_of(content["texts"])
        for name, text in content["texts"].items():
            protocol = text_protocol(text["tokens"], how["length"], how["bos"], text["data_hash"], how["dtype"])
            exact.append(entry(labels[name], "perplexity", text["perplexity"], protocol))
            for position, figures in zip(positions, text["runs"], strict=True):
                if position is not None:
                    run = self.runs[position]
                    ours = _figures(labels[name], figures, protocol, self.runtimes[position])
                    run.scores = merge_entries(run.scores, ours)
                    run.block_error[self._title(text)] = figures["block_error"]
        return self._float(content["fingerprint"], exact)

    def _title(self, text: Mapping[str, Any]) -> str:
        """The heading of a text's chart, with its digest where another text has the same."""
        plain, digest = f"{text['corpus']}, {text['tokens']:,} tokens", text["data_hash"]
        return plain if self.titles.setdefault(plain, digest) == digest else f"{plain} ({digest[:8]})"


def _figures(name: str, figures: Mapping[str, Any], protocol: Mapping[str, Any], runtime: str | None) -> list[Entry]:
    values = {label: figures[key] for key, label in FIGURES.items()}
    values["same top-1, %"] = 100 * figures["top1_agreement"]
    return [entry(name, label, value, protocol, runtime) for label, value in values.items()]
