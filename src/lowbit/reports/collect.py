"""What was measured on runs and their float models, from run folders and from what the commands printed.

A result belongs to the model whose weights have its fingerprint. So a float model's perplexity stands beside every
run that was made from it, and a file about other models is refused and not shown as if it were about these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.checkpoints.resolve import fingerprint
from lowbit.checkpoints.safetensors_folder import read_json
from lowbit.errors import LowbitError
from lowbit.evaluation.compare import FORMAT as COMPARED
from lowbit.evaluation.results import Entry, entry, kept, merged, results_of, text_protocol
from lowbit.exporters.run import Run
from lowbit.reports.facts import FloatFacts
from lowbit.runs.manifest import MANIFEST

FIGURES = {"perplexity": "perplexity", "kl_mean": "KL mean, nats", "kl_p99": "KL 99 %, nats"}


@dataclass
class Measured:
    """What is known of one run: entries as in ``evaluations``, and each block's error by text."""

    scores: list[Entry] = field(default_factory=list)
    block_error: dict[str, list[float]] = field(default_factory=dict)


def measured_of(runs: Sequence[Run], files: Sequence[Path]) -> tuple[list[Measured], list[FloatFacts]]:
    """For each run what was measured on it, and the float models of which something is known.

    Args:
        runs: the runs; what ``lowbit evaluate`` left in their folders is read.
        files: what ``lowbit evaluate --json`` or ``lowbit compare --json`` printed.
    """
    pool = _Pool(runs)
    for file in files:
        pool.read(file)
    return pool.runs, [FloatFacts(name, scores) for name, scores in pool.floats.values()]


class _Pool:
    """Results by the model that they belong to."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.prints = [fingerprint(run.folder) for run in runs]
        self.manifests = [hashlib.sha256((run.folder / MANIFEST).read_bytes()).hexdigest() for run in runs]
        self.runs = [Measured(kept(run.folder, own)) for run, own in zip(runs, self.prints, strict=True)]
        self.runtimes = [run.subject.scheme.target for run in runs]  # compare runs each as it was made for
        identities = [run.manifest.identity for run in runs]
        self.models = {one.fingerprint: one.model for one in identities}
        self.floats: dict[str, tuple[str, list[Entry]]] = {}

    def read(self, file: Path) -> None:
        """Take in a file, whichever of the two it is."""
        content = read_json(file)
        reader = self._compared if content.get("format") == COMPARED else self._evaluated
        try:
            known = reader(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise LowbitError(
                f"{file} is not what 'lowbit evaluate --json' or 'lowbit compare --json' of this version prints"
            ) from error
        if not known:
            raise LowbitError(f"{file} is about other models: give results of these runs or of their float model")

    def _evaluated(self, found: Mapping[str, Any]) -> bool:
        whose, entries = results_of(found)
        for run, own in zip(self.runs, self.prints, strict=True):
            if own == whose:
                run.scores = merged(run.scores, entries)
        return self._float(whose, entries) or whose in self.prints

    def _float(self, whose: str, entries: Sequence[Entry]) -> bool:
        """Keep entries of a float model, if runs here were made from it."""
        if whose not in self.models:
            return False
        name, old = self.floats.get(whose, (self.models[whose], []))
        self.floats[whose] = (name, merged(old, entries))
        return True

    def _compared(self, found: Mapping[str, Any]) -> bool:
        places = [
            self.manifests.index(one["manifest"]) if one["manifest"] in self.manifests else None
            for one in found["runs"]
        ]
        exact, length = [], found["protocol"]["length"]
        for name, text in found["texts"].items():
            protocol = text_protocol(text["tokens"], length, text["data_hash"])
            exact.append(entry(name, "perplexity", text["perplexity"], protocol))
            for place, figures in zip(places, text["runs"], strict=True):
                if place is not None:
                    run = self.runs[place]
                    run.scores = merged(run.scores, _figures(name, figures, protocol, self.runtimes[place]))
                    run.block_error[f"{text['corpus']}, {text['tokens']:,} tokens"] = figures["block_error"]
        return self._float(found["fingerprint"], exact)


def _figures(name: str, figures: Mapping[str, Any], protocol: Mapping[str, Any], runtime: str | None) -> list[Entry]:
    values = {label: figures[key] for key, label in FIGURES.items()}
    values["same top-1, %"] = 100 * figures["top1_agreement"]
    return [entry(name, label, value, protocol, runtime) for label, value in values.items()]
