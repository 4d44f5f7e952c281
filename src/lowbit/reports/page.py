"""Rendering of the report: facts about runs to one self-contained HTML document.

The page has no scripts: charts are inline SVG with tooltips, colours follow the reader's light or dark setting, long
parts fold. Its content security policy forbids every request, so that the content of a manifest cannot cause one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lowbit.reports import learned, outliers
from lowbit.reports.charts import Series, bars, cells, lines
from lowbit.reports.facts import FloatFacts, RunFacts, place_of
from lowbit.reports.scores import score_table
from lowbit.reports.svg import short
from lowbit.reports.texts import over_texts


def render(runs: Sequence[RunFacts], floats: Sequence[FloatFacts] = ()) -> str:
    """The report on one or several runs; ``floats`` are the float models that have results."""
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
        runs=[_Shown(run, index, floats) for index, run in enumerate(runs)],
        models=list(dict.fromkeys(run.manifest.identity.model for run in runs)),
        scores=score_table(runs, floats),
        over_texts=[one for run in runs for one in over_texts(run, floats)],
        quality=quality_charts(runs),
        sensitivity=sensitivity_charts(runs),
        routing=routing_charts(runs),
        cost=cost_charts(runs),
        outlier_charts=outliers.comparison(runs),
    )


class _Shown:
    """A run as the template reads it; ``style`` is the index of its colour."""

    def __init__(self, facts: RunFacts, style: int, floats: Sequence[FloatFacts]) -> None:
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
        told = [("texts", found) for one in over_texts(facts, floats) if (found := one.ratios.warning())]
        self.warnings = [*warnings(facts), *told]


def warnings(facts: RunFacts) -> list[tuple[str, str]]:
    """Notes as ``(where, what)``: fallbacks, modules left in float, restrictions on loading, runtime ops."""
    manifest = facts.manifest
    out = [(f"block {row.block}", note) for row in manifest.blocks for note in row.notes]
    if manifest.floats:
        out.append(("left in float", ", ".join(manifest.floats)))
    if manifest.prefix is not None:
        out.append(("prefix", manifest.prefix.sentence()))
    if manifest.kept_experts:
        out.append(("experts left in float", ", ".join(manifest.kept_experts)))
    if reason := manifest.transformers.why_not:
        out.append(("loading", f"stock transformers does not run this folder ({reason}): use lowbit.load"))
    if inputs := manifest.transformers.inputs:
        out.append(("inputs", f"stock transformers computes with {inputs}"))
    if (online := facts.online) is not None:
        first = next(iter(manifest.runtime_ops))
        out.append(("runtime ops", f"beside the model's graph, the first at {first}: {online.text}"))
    return out


def quality_charts(runs: Sequence[RunFacts]) -> list[tuple[str, Markup]]:
    """Each block's error: on calibration data from the run, and on other text from ``lowbit compare``."""
    own = [
        Series(run.name, [(float(row.block), row.relative_error) for row in run.blocks], index)
        for index, run in enumerate(runs)
    ]
    charts = [("Relative error after each block, calibration data", _by_block("relative error", own))]
    for text in dict.fromkeys(text for run in runs for text in run.block_error):
        series = [
            Series(run.name, [(float(i), value) for i, value in enumerate(run.block_error[text])], index)
            for index, run in enumerate(runs)
            if text in run.block_error
        ]
        charts.append((f"Relative error after each block, {text}", _by_block("relative error", series)))
    return [(title, chart) for title, chart in charts if chart]


def sensitivity_charts(runs: Sequence[RunFacts]) -> list[tuple[str, Markup]]:
    """Sensitivity: the error of each linear quantized alone, for every block, on one scale for all runs."""
    sensitivities = [(run, _sensitivity(run)) for run in runs]
    largest = max((value for _, values in sensitivities for value in values.values()), default=0.0)
    charts = []
    for run, values in sensitivities:
        if not values:
            continue
        rows = sorted({name for name, _ in values}, key=lambda name: place_of(name, run.manifest.quantized))
        (linear, block), worst = max(values.items(), key=lambda item: item[1])
        label = f"error of each linear of {run.name} alone; largest: block {block}, {linear}, {short(worst)}"
        title = f"{run.name}: each linear quantized alone, up to {short(worst)} (block {block}, {linear})"
        cell_values = {(rows.index(name), column): value for (name, column), value in values.items()}
        short_names = [name.rpartition(".")[2] for name in rows]
        charts.append((title, cells(label, short_names, cell_values, "block", largest)))
    return [(title, chart) for title, chart in charts if chart]


def _sensitivity(run: RunFacts) -> dict[tuple[str, int], float]:
    """Errors by linear and block; see ``lowbit.analysis.linear_error``."""
    rows = ((row.block, row.sensitivity["linears"]) for row in run.blocks if row.sensitivity)
    return {(name, block): record["error"] for block, linears in rows for name, record in linears.items()}


def routing_charts(runs: Sequence[RunFacts]) -> list[tuple[str, Markup]]:
    """Calibration tokens that reach each expert, by layer, for runs of mixtures."""
    charts = []
    for run in runs:
        limit = run.manifest.identity.expert_tokens
        for row in run.blocks:
            if not row.routing:
                continue
            cold = sum(tokens < limit for tokens in row.routing)
            label = f"{run.name}, block {row.block}: calibration tokens that reach each expert"
            title = f"{run.name}, block {row.block}: {cold} of {len(row.routing)} experts below {limit} tokens"
            charts.append(
                (title, bars(label, [(float(i), float(n)) for i, n in enumerate(row.routing)], "expert", "tokens"))
            )
    return [(title, chart) for title, chart in charts if chart]


def cost_charts(runs: Sequence[RunFacts]) -> list[tuple[str, Markup]]:
    """Seconds and peak memory of each block."""
    figures = (("seconds", "Seconds for each block", 1.0), ("peak_memory_bytes", "Peak memory so far, GB", 1e9))
    charts = []
    for key, title, unit in figures:
        series = [
            Series(run.name, [(float(row["block"]), row[key] / unit) for row in run.timing], index)
            for index, run in enumerate(runs)
        ]
        label = "seconds" if unit == 1 else "GB"
        charts.append((title, lines(f"{title}, by run", series, "block", label)))
    return [(title, chart) for title, chart in charts if chart]


def _by_block(measure: str, series: list[Series]) -> Markup | None:
    worst = ", ".join(
        f"{line.name}: {short(max(v for _, v in line.points))} at most" for line in series if line.points
    )
    return lines(f"{measure} by block; {worst}", series, "block", measure, log=True)


def megabytes(size: float) -> str:
    """Size in bytes as text.

    >>> megabytes(170_300_000), megabytes(1_040_000_000)
    ('170 MB', '1.04 GB')
    """
    units = itertools.takewhile(lambda unit: unit[0] <= size, ((1e6, "MB"), (1e9, "GB"), (1e12, "TB")))
    factor, name = list(units)[-1:][0] if size >= 1e6 else (1e3, "kB")
    return f"{size / factor:.3g} {name}"


def duration(seconds: float) -> str:
    """Duration in seconds as text.

    >>> duration(45.2), duration(306), duration(8000)
    ('45 s', '5 min 6 s', '2 h 13 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
