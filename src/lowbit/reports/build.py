"""``lowbit.report``: an HTML report on run folders and their evaluation results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.writing import write_bytes
from lowbit.errors import LowbitError, MissingExtra
from lowbit.exporters import EXPORTERS, exporter_of
from lowbit.exporters.run import Run, open_run
from lowbit.models.families import architecture_of
from lowbit.paths import user_path
from lowbit.reports.collect import Measured, measured_of
from lowbit.reports.command import command
from lowbit.reports.facts import Array, RunFacts, Target, place_of
from lowbit.reports.page import render
from lowbit.runs.activation_stats import FLOAT, MAP, OBSERVED, QUANTIZED, read_activation_stats
from lowbit.runs.folder import TIMING
from lowbit.runs.online_cost import online_cost
from lowbit.torch_state import own_torch_state


@dataclass(frozen=True)
class Reported:
    """The result of ``report``: the page, its size, and the names of its runs."""

    out: Path
    size_bytes: int
    runs: list[str]


@own_torch_state
def report(
    folders: str | Path | Sequence[str | Path],
    *,
    out: str | Path = "report.html",
    measured: Iterable[str | Path] = (),
) -> Reported:
    """Write an HTML report on finished runs; several runs are compared side by side.

    Args:
        folders: run folders.
        out: the page; an existing file is replaced.
        measured: files with the output of ``lowbit evaluate --json`` or ``lowbit compare --json`` for these runs or
            their float models. Results that ``lowbit evaluate`` stored in a run folder are included without it.

    Raises:
        LowbitError: a folder is not a finished run, a file has another format or belongs to other models, or the
            page cannot be written.
    """
    folder_list = [folders] if isinstance(folders, str | Path) else list(folders)
    if not folder_list:
        raise LowbitError("no run given: name at least one run folder")
    paths, out = [user_path(folder) for folder in folder_list], user_path(out)
    if out.is_dir():
        raise LowbitError(f"{out} is a folder; name the file to write, such as {out / 'report.html'}")
    if duplicates := [path for i, path in enumerate(paths) if path.resolve() in [p.resolve() for p in paths[:i]]]:
        raise LowbitError(f"{duplicates[0]} is given twice; name each run once")
    _check_out(out, paths, [user_path(file) for file in measured])
    runs = [open_run(path) for path in paths]
    names = _names(paths)
    results, floats = measured_of(runs, [user_path(file) for file in measured])
    facts = [_facts(run, name, result) for run, name, result in zip(runs, names, results, strict=True)]
    content = render(facts, floats).encode(errors="backslashreplace")
    write_bytes(out, content)
    return Reported(out, len(content), names)


def _check_out(out: Path, runs: Sequence[Path], measured: Sequence[Path]) -> None:
    """Refuse a page in place of what it is made from."""
    place = out.resolve()
    if place in [file.resolve() for file in measured]:
        raise LowbitError(f"--out {out} is one of the files with results, which it would replace; name another file")
    for run in runs:
        if place.is_relative_to(run.resolve()) and place.suffix.lower() not in (".html", ".htm"):
            raise LowbitError(
                f"--out {out} is in the run folder {run}, where only a page may be written: name a file such as "
                f"{run / 'report.html'}"
            )


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of the folders, prefixed with as many parents as make them unique."""
    parts = [path.resolve().parts for path in paths]
    depth = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(path_parts[-depth:]) for path_parts in parts]


def _facts(run: Run, name: str, results: Measured) -> RunFacts:
    command_line, recipe = command(run.manifest.request)
    stats = read_activation_stats(run.folder)
    return RunFacts(
        name=name,
        manifest=run.manifest,
        timing=_timing(run.folder / TIMING),
        size_bytes=sum(path.stat().st_size for path in run.checkpoint.files),
        targets=_targets(run),
        command=command_line,
        recipe=recipe,
        scores=results.scores,
        block_error=results.block_error,
        peaks=_peaks(run, stats),
        pictures=_pictures(stats),
        online=online_cost(run.checkpoint, run.manifest, _linears(run)),
    )


def _timing(path: Path) -> list[dict[str, Any]]:
    """Rows of the timing file, none without it; raises ``LowbitError`` for a broken one."""
    if not path.exists():
        return []
    rows = read_json(path).get("blocks")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_timed(row) for row in rows):
        raise LowbitError(f"{path} is broken: delete it, and the report leaves out times and memory")
    return rows


def _is_timed(row: Mapping[str, Any]) -> bool:
    """Whether a block's row has what is drawn.

    >>> _is_timed({"block": 0, "seconds": 1.5, "peak_memory_bytes": 2}), _is_timed({"block": 0})
    (True, False)
    """
    values = [row.get(key) for key in ("block", "seconds", "peak_memory_bytes")]
    return all(isinstance(value, int | float) and 0 <= value < math.inf for value in values)


def _linears(run: Run) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of the quantized linears in decoder layers."""
    architecture = architecture_of(run.subject.config)
    outside = (architecture.embed, architecture.head)
    return {name: run.subject.shapes[name] for name in run.quantized if name not in outside}


def _targets(run: Run) -> list[Target]:
    """The loaders and export targets, each with whether it supports the run."""
    loads = run.manifest.transformers
    out = [Target("lowbit.load", True), Target("transformers", loads.loads, loads.why_not or "")]
    for name in EXPORTERS:
        try:
            find = exporter_of(name).misfit
        except MissingExtra as error:
            out.append(Target(name, None, str(error)))
            continue
        misfit = find(run.subject)
        out.append(Target(name, misfit is None, f"{misfit.field}: {misfit.why}" if misfit else ""))
    return out


def _peaks(run: Run, seen: Mapping[str, Tensor]) -> dict[str, tuple[Array, Array]]:
    """Channel peaks ``(blocks, in)`` of float model and run, by linears that share an input, in execution order."""
    peaks: dict[str, dict[str, dict[int, Array]]] = {}
    for name, value in seen.items():
        kind, index, linears = name.split(".", 2)
        if kind in (FLOAT, QUANTIZED):
            peaks.setdefault(linears, {FLOAT: {}, QUANTIZED: {}})[kind][int(index)] = value.numpy()
    for kinds in peaks.values():
        exact, ours = kinds[FLOAT], kinds[QUANTIZED]
        if set(exact) != set(ours) or len({value.shape for value in [*exact.values(), *ours.values()]}) != 1:
            raise LowbitError(f"{run.folder / OBSERVED} is broken: quantize again into another folder")

    def stacked(kind: Mapping[int, Array]) -> Array:
        return np.stack([kind[block] for block in sorted(kind)])

    return {
        linears: (stacked(peaks[linears][FLOAT]), stacked(peaks[linears][QUANTIZED]))
        for linears in sorted(peaks, key=lambda name: place_of(name.partition("+")[0], run.quantized))
    }


def _pictures(seen: Mapping[str, Tensor]) -> dict[tuple[int, str, str], Array]:
    parts = ((name.split(".", 3), value) for name, value in seen.items() if name.startswith(f"{MAP}."))
    return {(int(block), step, site): value.numpy() for (_, block, step, site), value in parts}
