"""What ``results.py`` measures: the recipes of each scheme, the texts, and how a row comes about."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.data.builtin import MIXTURE, unseen_kind
from lowbit.quant.scheme_names import parse_scheme
from lowbit.quant.static_activations import StaticActs
from lowbit.runs.folder import TIMING
from rows import ROOT, apart, cpu_seconds, found, lowbit, outdated, text_identity

MEASURED = ROOT / "docs" / "measured" / "results"
MODEL = "demo"
SAMPLES, CALIBRATION_LENGTH, EVALUATION_SEED = 16, 256, 0
LENGTH = 512
EFFORT = "quick"

# Recipes by scheme; the float model is always measured, and the first recipe is the unit of cost.
ROWS = {
    "w8a16": ("rtn",),
    "w4a16g64-sym": (
        *("rtn", "awq", "gptq", "qronos", "awq+gptq", "affinequant+gptq"),
        *("rounding", "best", "sparsegpt"),
    ),
    "w3a16g64-asym": (
        *("rtn", "awq", "gptq", "qronos", "awq+gptq", "affinequant+gptq"),
        *("rounding", "best"),
    ),
    "w2a16g64-asym": (
        *("rtn", "gptq", "qronos", "awq+gptq", "affinequant+gptq"),
        *("rounding", "best"),
    ),
    "w8a8": ("rtn", "smoothquant", "outlier-suppression+"),
    "w6a6": ("rtn", "smoothquant", "outlier-suppression+", "affinequant+refit"),
    "w8a8-sym": ("rtn", "llm-int8"),
    "w4a8g64-sym": ("rtn", "zeroquant", "zeroquant-lkd"),
    "w4a8-static": ("rtn", "gptq"),
    "w4a8-static32": ("rtn", "gptq", "rptq"),
    "w4a4": ("rtn", "omniquant", "affinequant", "qllm", "affinequant+qllm"),
}

FLOAT = "float"
Cell = tuple[str, str, int]  # scheme, recipe, seed
Figures = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Sequence[Figures]]]  # by scheme and recipe, one for each seed


@dataclass(frozen=True)
class Protocol:
    """What every row of a document has in common.

    Attributes:
        calibration: ``--data`` of ``lowbit quantize``.
        texts: heading of a text's columns by ``--data`` of ``lowbit compare``, in pairs.
        tokens: of each text at most.
        lambada: documents of LAMBADA; without it, where 0.
        task_data: where these come from, as for ``lowbit evaluate``.
    """

    calibration: str
    texts: tuple[tuple[str, str], ...]
    tokens: int
    lambada: int
    task_data: str = "auto"

    def measure(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Rows: quantize each, compare all with the float model at once, forget the folders.

        The float model is compared with itself: its divergence of 0 shows that the comparison is exact.
        """
        with tempfile.TemporaryDirectory() as name:
            made = [self._made(cell, Path(name) / str(at)) for at, cell in enumerate(cells)]
            targets = [target for target, _ in made]
            began = time.monotonic()
            told, compared = cpu_seconds(lambda: {"rows": self.compare(targets)})
            share = {"cpu": compared / len(cells), "wall": (time.monotonic() - began) / len(cells)}
            rows = []
            for (target, row), figures in zip(made, told["rows"], strict=True):
                began = time.monotonic()
                answers, evaluated = cpu_seconds(partial(self.answers, target))
                wall = row.pop("wall", 0.0) + share["wall"] + time.monotonic() - began
                spent = {"evaluation_cpu_seconds": share["cpu"] + evaluated, "wall_seconds": wall}
                rows.append({**row, **figures, **answers, **spent})
        return rows

    def _made(self, cell: Cell, out: Path) -> tuple[str, dict[str, Any]]:
        """What is compared, and what making it took."""
        scheme, recipe, seed = cell
        if recipe == FLOAT:
            return MODEL, {}
        began = time.monotonic()
        drawn = ["--samples", str(SAMPLES), "--length", str(CALIBRATION_LENGTH), "--seed", str(seed)]
        what = ["--scheme", scheme, "--recipe", recipe, "--data", self.calibration, "--effort", EFFORT]
        made, seconds = cpu_seconds(lambda: lowbit("quantize", MODEL, "--out", str(out), *what, *drawn))
        row = {key: made[key] for key in ("bits_per_weight", "warnings")}
        row["versions"] = json.loads((out / "lowbit.json").read_text())["versions"]
        row["cost"] = {"cpu_seconds": seconds, "peak_memory_bytes": peak_memory(out)}
        return str(out), {**row, "wall": time.monotonic() - began}

    def compare(self, targets: Sequence[str]) -> list[dict[str, Any]]:
        """Figures of folders on all texts."""
        data = [part for _, text in self.texts for part in ("--data", text)]
        how = ["--length", str(LENGTH), "--tokens", str(self.tokens), "--seed", str(EVALUATION_SEED)]
        return apart(lowbit("compare", MODEL, *targets, *data, *how))

    def answers(self, target: str) -> dict[str, Any]:
        """Figures of a folder on LAMBADA, if it is asked for."""
        if not self.lambada:
            return {}
        asked = ["--tasks", "lambada_openai", "--task-data", self.task_data, "--limit", str(self.lambada)]
        return {"lambada": lowbit("evaluate", target, *asked, "--seed", str(EVALUATION_SEED))["zero_shot"]}

    def key(self, cell: Cell) -> object:
        """What identifies a row."""
        texts = tuple((heading, text_identity(text)) for heading, text in self.texts)
        placed = replace(self, calibration=text_identity(self.calibration), texts=texts)
        return (placed, MODEL, SAMPLES, CALIBRATION_LENGTH, EVALUATION_SEED, LENGTH, EFFORT, *cell)

    def rows(self, seeds: int) -> Rows:
        """All measured rows; schemes and recipes without any are left out."""
        rows: dict[str, dict[str, list[Figures]]] = {}
        for cell in cells(ROWS, (), seeds):
            if (row := found(MEASURED, self.key(cell), any_code=True)) is not None:
                rows.setdefault(cell[0], {}).setdefault(cell[1], []).append(row)
        return {
            scheme: {recipe: rows[scheme][recipe] for recipe in ROWS[scheme] if recipe in rows[scheme]}
            for scheme in ROWS
            if scheme in rows
        }

    def earlier(self, seeds: int) -> str:
        """How many rows other sources have measured, in words."""
        return outdated(MEASURED, (self.key(cell) for cell in [("-", FLOAT, 0), *cells(ROWS, (), seeds)]))


def seeds_of(scheme: str, recipe: str, seeds: int) -> range:
    """The calibration seeds of a row: one where nothing is calibrated.

    >>> seeds_of("w4a4", "rtn", 3), seeds_of("w4a4", "gptq", 3), seeds_of("w4a8-static", "rtn", 3)
    (range(0, 1), range(0, 3), range(0, 3))
    """
    calibrated = recipe != "rtn" or isinstance(parse_scheme(scheme).act, StaticActs)
    return range(seeds if calibrated else 1)


def cells(schemes: Iterable[str], recipes: Sequence[str], seeds: int) -> list[Cell]:
    """The rows of some schemes, all of a seed before the next seed; of ``recipes`` alone, if there are any."""
    chosen = [(scheme, recipe) for scheme in schemes for recipe in ROWS[scheme] if not recipes or recipe in recipes]
    return [
        (scheme, recipe, seed)
        for seed in range(seeds)
        for scheme, recipe in chosen
        if seed in seeds_of(scheme, recipe, seeds)
    ]


def protocol_of(wikitext2: Path | None, ptb: Path | None, tokens: int, lambada: int, task_data: str) -> Protocol:
    """The texts of a document: of the kind that is calibrated on, C4, and last one of a kind that calibration lacks.

    Calibration on WikiText-2 has seen neither code nor other languages: the multilingual text is held back. The
    built-in mixture has, so that the technical text follows. WikiText-2 is Wikipedia's text: one of them is enough.
    """
    calibration, texts = "builtin", [("Wikipedia", "builtin:wiki")]
    if wikitext2 is not None:
        calibration, test = (str(wikitext2 / f"wiki.{part}.raw") for part in ("valid", "test"))
        texts = [("WikiText-2", test)]
    if ptb is not None:
        texts.append(("PTB", str(ptb)))
    texts += [("C4", "builtin:c4"), ("Multilingual", "builtin:multilingual")]
    if wikitext2 is None:
        texts.append((unseen_kind(MIXTURE).capitalize(), f"builtin:{unseen_kind(MIXTURE)}"))
    return Protocol(calibration, tuple(texts), tokens, lambada, task_data)


def peak_memory(run: Path) -> int:
    """The largest memory while quantizing, from the run's own record: evaluation has a peak too."""
    return max(int(block["peak_memory_bytes"]) for block in json.loads((run / TIMING).read_text())["blocks"])
