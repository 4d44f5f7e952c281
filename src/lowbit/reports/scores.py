"""The table of results: a row for each text or task under one protocol, a column for each model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.reports.facts import FloatFacts, RunFacts


@dataclass(frozen=True)
class Cell:
    """A value as text, and how it relates to the float model's in the same row."""

    text: str
    against: str = ""


@dataclass(frozen=True)
class Row:
    """Values that compare: of one text or task, one measure, one protocol."""

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
    """All results, if there are any; a cell is ``None`` where nothing was measured under its row's protocol.

    A run has a row of its own for each runtime that was simulated; the float model's value stands in all of them.
    """
    exact = [{_question(one): one for one in model.scores} for model in floats]
    ours = [{(_question(one), one["runtime"] or ""): one for one in run.scores} for run in runs]
    asked = {key for some in ours for key in some}
    asked |= {(question, "") for some in exact for question in some if question not in {q for q, _ in asked}}
    rows = [
        _row([some.get(question) for some in exact], [some.get((question, runtime)) for some in ours], runtime)
        for question, runtime in sorted(asked)
    ]
    return Table([f"float: {one.name}" for one in floats] + [run.name for run in runs], rows) if rows else None


def _question(one: Mapping[str, Any]) -> str:
    """Equal for entries that compare."""
    return json.dumps([one["on"], one["measure"], one["protocol"]], sort_keys=True)


def _row(exact: list[Mapping[str, Any] | None], ours: list[Mapping[str, Any] | None], runtime: str) -> Row:
    one = next(value for value in [*exact, *ours] if value is not None)
    unit = next((value["value"] for value in exact if value and value["value"]), None)
    protocol = ", ".join(f"{k} {str(v)[:12] if k == 'hash' else v}" for k, v in one["protocol"].items())
    protocol += f", inputs rounded as on {runtime}" if runtime else ""
    cells = [*(_cell(value, None) for value in exact), *(_cell(value, unit) for value in ours)]
    return Row(one["on"], one["measure"], protocol, cells)


def _cell(one: Mapping[str, Any] | None, exact: float | None) -> Cell | None:
    if one is None:
        return None
    if one["value"] is None:
        return Cell("not finite")
    text = number(one["value"]) + (f" ± {number(one['error'])}" if one.get("error") else "")
    return Cell(text, f"×{number(one['value'] / exact)}" if exact else "")


def number(value: float) -> str:
    """Four digits for what is compared.

    >>> number(26.6711), number(0.41237), number(1234.5)
    ('26.67', '0.4124', '1234')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
