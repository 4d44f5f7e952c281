"""The measured part of ``docs/generalization.md``: for each run its tables, then all runs block by block."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rows import filled, line

Figures = Mapping[str, Any]
HEADS = ("tokens", "float loss", "excess, mean", "median", "99 %", "share")
NOTES = 5  # of a run, at most: a damping that is raised in one block is raised in many
# Sites of a layer in the order of execution, and the ends of the names of the inputs that belong to them.
SITES = {
    "q, k, v": ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"),
    "o": ("o_proj", "out_proj", "dense"),
    "gate, up": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc"),
    "down": ("down_proj", "fc2", "c_proj"),
}


def measured(rows: Sequence[Figures]) -> str:
    """All runs as Markdown."""
    lines: list[str] = []
    for row in rows:
        lines += run(row)
    return "\n".join([*lines, *blocks(rows), ""])


def title(row: Figures) -> str:
    """A run's recipe, scheme and text."""
    return f"{row['recipe']}, {row['scheme']}, on {row['corpora'][1]}"


def run(row: Figures) -> Iterator[str]:
    """One run: what it is, then its tables."""
    (samples, length), (windows, window) = row["sizes"]
    yield from [f"### {title(row)}", ""]
    yield filled(
        f"{row['bits_per_weight']:.3f} bits per weight; calibrated on {samples} x {length} tokens of "
        f"{row['corpora'][0]}. Perplexity on {windows} x {window} tokens: {row['perplexity']:.2f}, "
        f"{row['perplexity'] / row['float_perplexity']:.3f} times the float model's {row['float_perplexity']:.2f}."
    )
    if row["notes"]:
        yield from ["", f"Notes of the run, {min(NOTES, len(row['notes']))} of {len(row['notes'])}:", ""]
        yield from (filled(note, "* ") for note in row["notes"][:NOTES])
    for name, head in (
        ("kinds", "kind of token"),
        ("positions", "position in the window"),
        ("beyond", "largest value against calibration"),
    ):
        yield from ["", *excess(head, row[name])]
    yield from ["", *inputs(row["inputs"]), ""]


def excess(head: str, table: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table of ``generalization_measure.excess``."""
    lines = [line([head, *HEADS]), "|---|" + "---:|" * len(HEADS)]
    for label, one in table.items():
        figures = (f"{one[key]:.2f}" for key in ("float", "mean", "median", "p99"))
        lines.append(line([label, str(one["tokens"]), *figures, f"{100 * one['share']:.0f} %"]))
    return lines


def inputs(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Ranges of inputs by site: medians and maxima over the blocks, and the block of the largest ratio.

    Ratios of 1.5 and 3.0 in blocks 0 and 1 are a median of 2.25 and a maximum of ``3.00 (block 1)``.
    """
    heads = ["input of", "range, median", "range, maximum", "channel, maximum", "channels doubled, mean"]
    lines = [line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    for site, names in grouped(found).items():
        tensor = {name: found[name]["tensor"] for name in names}
        channel = {name: found[name]["channel"] for name in names}
        share = statistics.fmean(found[name]["share"] for name in names)
        cells = [site, f"{statistics.median(tensor.values()):.2f}", _largest(tensor), _largest(channel)]
        lines.append(line([*cells, f"{100 * share:.2f} %"]))
    return lines


def grouped(names: Mapping[str, object]) -> dict[str, list[str]]:
    """Names of inputs by site; what belongs to none is a site of its own.

    >>> grouped({"0.mlp.gate_proj+mlp.up_proj": 1, "0.mlp.router": 1})
    {'gate, up': ['0.mlp.gate_proj+mlp.up_proj'], 'router': ['0.mlp.router']}
    """
    sites: dict[str, list[str]] = {site: [] for site in SITES}
    for name in names:
        end = name.partition("+")[0].rpartition(".")[2]
        site = next((site for site, ends in SITES.items() if end in ends), end)
        sites.setdefault(site, []).append(name)
    return {site: own for site, own in sites.items() if own}


def _largest(values: Mapping[str, float]) -> str:
    name = max(values, key=values.__getitem__)
    return f"{values[name]:.2f} (block {name.partition('.')[0]})"


def blocks(rows: Sequence[Figures]) -> list[str]:
    """The errors of hidden states behind each block, on the calibration tokens and on the text."""
    columns = [title(row) for row in rows]
    lines = ["### Block by block", "", line(["block", *columns]), "|---|" + "---:|" * len(columns)]
    for index in range(max(len(row["blocks"][0]) for row in rows)):
        cells = []
        for row in rows:
            shown, text = (errors[index] if index < len(errors) else None for errors in row["blocks"])
            cells.append("" if shown is None or text is None else f"{shown:.4f} -> {text:.4f}")
        lines.append(line([str(index), *cells]))
    return lines
