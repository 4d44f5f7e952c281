"""``lowbit.report``: one HTML page from run folders, with everything that they, and measurements of them, say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from lowbit.checkpoints.safetensors_folder import read_json, write_bytes
from lowbit.errors import LowbitError, MissingExtra
from lowbit.exporters import EXPORTERS, exporter_of
from lowbit.exporters.run import Run, open_run
from lowbit.reports.collect import Measured, measured_of
from lowbit.reports.command import command
from lowbit.reports.facts import Array, RunFacts, Target, place_of
from lowbit.reports.page import render
from lowbit.runs.activation_stats import FLOAT, MAP, OBSERVED, QUANTIZED, read_activation_stats
from lowbit.runs.folder import TIMING


@dataclass(frozen=True)
class Reported:
    """What ``report`` wrote: the page, how large it is, and the runs on it by name."""

    out: Path
    size_bytes: int
    runs: list[str]


def report(
    folders: str | Path | Sequence[str | Path],
    *,
    out: str | Path = "report.html",
    measured: Iterable[str | Path] = (),
) -> Reported:
    """Write one HTML page about finished runs; several become a comparison.

    Args:
        folders: run folders.
        out: the page; one that is there is replaced.
        measured: files with what ``lowbit evaluate --json`` or ``lowbit compare --json`` printed, about these runs or
            their float models. What ``lowbit evaluate`` printed for a run on this machine is in its folder anyway.

    Raises:
        LowbitError: a folder is no finished run, a file is none of these or about another model, or the page cannot
            be written.
    """
    given = [folders] if isinstance(folders, str | Path) else list(folders)
    if not given:
        raise LowbitError("no run given: name at least one run folder")
    paths, out = [Path(folder) for folder in given], Path(out)
    if out.is_dir():
        raise LowbitError(f"{out} is a folder; name the file to write, such as {out / 'report.html'}")
    if twice := [path for at, path in enumerate(paths) if path.resolve() in [p.resolve() for p in paths[:at]]]:
        raise LowbitError(f"{twice[0]} is given twice; name each run once")
    runs = [open_run(path) for path in paths]
    names = _names(paths)
    found, floats = measured_of(runs, [Path(file) for file in measured])
    facts = [_facts(*given) for given in zip(runs, names, found, strict=True)]
    content = render(facts, floats).encode()
    write_bytes(out, content)
    return Reported(out, len(content), names)


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many parents before them as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(one[-depth:]) for one in parts]


def _facts(run: Run, name: str, found: Measured) -> RunFacts:
    repeat, recipe = command(run.manifest.request)
    timing, seen = run.folder / TIMING, read_activation_stats(run.folder)
    return RunFacts(
        name=name,
        manifest=run.manifest,
        timing=read_json(timing)["blocks"] if timing.exists() else [],
        size_bytes=sum(path.stat().st_size for path in run.checkpoint.files),
        targets=_targets(run),
        command=repeat,
        recipe=recipe,
        scores=found.scores,
        block_error=found.block_error,
        peaks=_peaks(run, seen),
        pictures=_pictures(seen),
    )


def _targets(run: Run) -> list[Target]:
    """Where the run can go: asked of each export target itself."""
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
    """By the linears that read one tensor, in execution order: ``(blocks, in)`` of the float model and of the run."""
    found: dict[str, dict[str, dict[int, Array]]] = {}
    for name, value in seen.items():
        kind, index, linears = name.split(".", 2)
        if kind in (FLOAT, QUANTIZED):
            found.setdefault(linears, {FLOAT: {}, QUANTIZED: {}})[kind][int(index)] = value.numpy()
    for kinds in found.values():
        before, after = kinds[FLOAT], kinds[QUANTIZED]
        if set(before) != set(after) or len({value.shape for value in [*before.values(), *after.values()]}) != 1:
            raise LowbitError(f"{run.folder / OBSERVED} is broken: quantize again into another folder")

    def stacked(kind: Mapping[int, Array]) -> Array:
        return np.stack([kind[block] for block in sorted(kind)])

    return {
        linears: (stacked(found[linears][FLOAT]), stacked(found[linears][QUANTIZED]))
        for linears in sorted(found, key=lambda name: place_of(name.partition("+")[0], run.quantized))
    }


def _pictures(seen: Mapping[str, Tensor]) -> dict[tuple[int, str, str], Array]:
    parts = ((name.split(".", 3), value) for name, value in seen.items() if name.startswith(f"{MAP}."))
    return {(int(block), step, site): value.numpy() for (_, block, step, site), value in parts}
