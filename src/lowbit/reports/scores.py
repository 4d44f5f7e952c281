"""The table of results: a row for each text or task and protocol, a column for each model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.reports.facts import FloatFacts, RunFacts


@dataclass(frozen=True)
class Cell:
    """A value as text, and its ratio to the float model's in the same row."""

    text: str
    against: str = ""


@dataclass(frozen=True)
class Row:
    """Comparable values: one text or task, one measure, one protocol."""

    on: str
    measure: str
    protocol: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Table:
    """Names of the columns, float models first, and the rows."""

    columns: list[str]
    rows: list[Row]


def score_table(runs: Sequence[RunFacts], floats: Sequence[FloatFacts]) -> Table | None:
    """All results, or ``None`` without any; a cell is ``None`` where its row's protocol was not evaluated.

    Each simulated runtime has its own row; the float model's value is repeated in all of them. A run's ratio is to
    the float model that it was made from.
    """
    made_from = {model.fingerprint: place for place, model in enumerate(floats)}
    whose = [made_from.get(run.manifest.identity.fingerprint) for run in runs]
    exact = [{question(result): result for result in model.scores} for model in floats]
    ours = [{(question(result), result["runtime"] or ""): result for result in run.scores} for run in runs]
    asked = {key for results in ours for key in results}
    asked |= {(key, "") for results in exact for key in results if key not in {q for q, _ in asked}}
    rows = [
        _row([model.get(key) for model in exact], [run.get((key, runtime)) for run in ours], whose, runtime)
        for key, runtime in sorted(asked)
    ]
    return Table([f"float: {model.name}" for model in floats] + [run.name for run in runs], rows) if rows else None


def question(result: Mapping[str, Any]) -> str:
    """A key that is equal for comparable entries: text or task, measure and protocol."""
    return json.dumps([result["on"], result["measure"], result["protocol"]], sort_keys=True)


def _row(
    exact: list[Mapping[str, Any] | None],
    ours: list[Mapping[str, Any] | None],
    whose: list[int | None],
    runtime: str,
) -> Row:
    """A row; ``whose`` are the places of the runs' float models in ``exact``, ``None`` for one without results."""
    sample = next(value for value in [*exact, *ours] if value is not None)
    units = [None if place is None else exact[place] for place in whose]
    protocol = ", ".join(f"{k} {str(v)[:12] if k == 'hash' else v}" for k, v in sample["protocol"].items())
    protocol += f", inputs quantized as on {runtime}" if runtime else ""
    cells = [*(_cell(value, None) for value in exact), *map(_cell, ours, units)]
    return Row(sample["on"], sample["measure"], protocol, cells)


def _cell(result: Mapping[str, Any] | None, exact: Mapping[str, Any] | None) -> Cell | None:
    if result is None:
        return None
    if result["value"] is None:
        return Cell("not finite")
    text = number(result["value"]) + (f" ± {number(result['error'])}" if result.get("error") else "")
    unit = exact["value"] if exact else None
    return Cell(text, f"×{number(result['value'] / unit)}" if unit else "")


def number(value: float) -> str:
    """A number to four digits.

    >>> number(26.6711), number(0.41237), number(1234.5)
    ('26.67', '0.4124', '1234')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
