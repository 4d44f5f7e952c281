"""The page: facts about runs in, one HTML document out, with nothing to fetch and nothing to run.

No script: charts are inline SVG that says its values when it is pointed at, light and dark follow the reader's
setting, what is long folds away. The page forbids itself every request, so that what a manifest says cannot make one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lowbit.reports import learned, outliers
from lowbit.reports.charts import Series, cells, lines
from lowbit.reports.facts import FloatFacts, RunFacts, place_of
from lowbit.reports.scores import score_table
from lowbit.reports.svg import short
from lowbit.runs.manifest import Manifest


def render(runs: Sequence[RunFacts], floats: Sequence[FloatFacts] = ()) -> str:
    """The report on one or several runs; ``floats`` are the float models that something was measured on."""
    environment = Environment(
        loader=PackageLoader("lowbit.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "megabytes": megabytes, "duration": duration}
    page = environment.get_template("page.html")
    return page.render(
        runs=[_Shown(run, at) for at, run in enumerate(runs)],
        models=list(dict.fromkeys(run.manifest.identity.model for run in runs)),
        scores=score_table(runs, floats),
        quality=quality_charts(runs),
        sensitivity=damage_charts(runs),
        cost=cost_charts(runs),
        outlier_charts=outliers.comparison(runs),
    )


class _Shown:
    """A run as the template reads it; ``style`` is the number of its colour."""

    def __init__(self, facts: RunFacts, style: int) -> None:
        self.facts, self.style = facts, style
        self.manifest, self.identity = facts.manifest, facts.manifest.identity
        self.runtime = self.identity.scheme.get("target")
        self.steps = " → ".join(self.identity.steps)
        self.seconds = sum(row["seconds"] for row in facts.timing) if facts.timing else None
        self.memory = max((row["peak_memory_bytes"] for row in facts.timing), default=None)
        self.losses = learned.losses(facts)
        self.matrices = learned.matrices(facts)
        self.conditions = learned.conditions(facts)
        self.legend = learned.legend(facts)
        self.reassemblies = learned.reassemblies(facts, style)
        self.sites = outliers.sites(facts, style)
        self.warnings = warnings(facts.manifest)


def warnings(manifest: Manifest) -> list[tuple[str, str]]:
    """What a reader must know, as ``(where, what)``: what stayed float, what was done differently, what loads it."""
    out = [(f"block {row.block}", note) for row in manifest.blocks for note in row.notes]
    if manifest.floats:
        out.append(("left in float", ", ".join(manifest.floats)))
    if reason := manifest.transformers.why_not:
        out.append(("loading", f"stock transformers does not run this folder ({reason}): use lowbit.load"))
    if inputs := manifest.transformers.inputs:
        out.append(("inputs", f"stock transformers computes with {inputs}"))
    if ops := manifest.runtime_ops:
        first = next(iter(ops))
        out.append(("runtime ops", f"{len(ops)} stay beside the model's graph, a {ops[first]} at {first} first"))
    return out


def quality_charts(runs: Sequence[RunFacts]) -> list[tuple[str, Markup]]:
    """Each block's error: as the run saw it on calibration data, and as ``lowbit compare`` did on other text."""
    own = [
        Series(run.name, [(float(row.block), row.relative_error) for row in run.blocks], at)
        for at, run in enumerate(runs)
    ]
    charts = [("Relative error after each block, calibration data", _by_block("relative error", own))]
    for text in dict.fromkeys(text for run in runs for text in run.block_error):
        series = [
            Series(run.name, [(float(i), value) for i, value in enumerate(run.block_error[text])], at)
            for at, run in enumerate(runs)
            if text in run.block_error
        ]
        charts.append((f"Relative error after each block, {text}", _by_block("relative error", series)))
    return [(title, chart) for title, chart in charts if chart]


def damage_charts(runs: Sequence[RunFacts]) -> list[tuple[str, Markup]]:
    """Where each run broke: the error that each linear makes alone, for every block, on one scale for all runs."""
    found = [(run, _sensitivity(run)) for run in runs]
    largest = max((value for _, values in found for value in values.values()), default=0.0)
    charts = []
    for run, values in found:
        if not values:
            continue
        rows = sorted({name for name, _ in values}, key=lambda name: place_of(name, run.manifest.quantized))
        (linear, block), worst = max(values.items(), key=lambda item: item[1])
        label = f"error that each linear of {run.name} makes alone; most: block {block}, {linear}, {short(worst)}"
        title = f"{run.name}: each linear alone, up to {short(worst)} (block {block}, {linear})"
        places = {(rows.index(name), at): value for (name, at), value in values.items()}
        short_names = [name.rpartition(".")[2] for name in rows]
        charts.append((title, cells(label, short_names, places, "block", largest)))
    return [(title, chart) for title, chart in charts if chart]


def _sensitivity(run: RunFacts) -> dict[tuple[str, int], float]:
    """Errors by linear and block; see ``lowbit.analysis.linear_error``."""
    rows = ((row.block, row.sensitivity["linears"]) for row in run.blocks if row.sensitivity)
    return {(name, block): one["error"] for block, linears in rows for name, one in linears.items()}


def cost_charts(runs: Sequence[RunFacts]) -> list[tuple[str, Markup]]:
    """Seconds and peak memory of each block."""
    what = (("seconds", "Seconds for each block", 1.0), ("peak_memory_bytes", "Peak memory so far, GB", 1e9))
    charts = []
    for key, title, unit in what:
        series = [
            Series(run.name, [(float(row["block"]), row[key] / unit) for row in run.timing], at)
            for at, run in enumerate(runs)
        ]
        label = "seconds" if unit == 1 else "GB"
        charts.append((title, lines(f"{title}, by run", series, "block", label)))
    return [(title, chart) for title, chart in charts if chart]


def _by_block(what: str, series: list[Series]) -> Markup | None:
    worst = ", ".join(f"{one.name}: {short(max(v for _, v in one.points))} at most" for one in series if one.points)
    return lines(f"{what} by block; {worst}", series, "block", what, log=True)


def megabytes(size: float) -> str:
    """Bytes for a reader.

    >>> megabytes(170_300_000), megabytes(1_040_000_000)
    ('170 MB', '1.04 GB')
    """
    units = itertools.takewhile(lambda unit: unit[0] <= size, ((1e6, "MB"), (1e9, "GB"), (1e12, "TB")))
    factor, name = list(units)[-1:][0] if size >= 1e6 else (1e3, "kB")
    return f"{size / factor:.3g} {name}"


def duration(seconds: float) -> str:
    """Seconds for a reader.

    >>> duration(45.2), duration(306), duration(8000)
    ('45 s', '5 min 6 s', '2 h 13 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
