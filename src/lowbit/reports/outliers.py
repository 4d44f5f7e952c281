"""Activation outliers: each channel's largest activation in the float model and in the run, for every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from lowbit.reports.charts import Series, lines
from lowbit.reports.facts import Array, RunFacts
from lowbit.reports.pixels import strengths
from lowbit.reports.svg import short

FULL = 64.0  # channels at this many times the median, or more, have full opacity
COLUMNS = 288  # most columns of an image; channels that share one are pooled by maximum


@dataclass(frozen=True)
class Site:
    """Images and chart for linears that share an input.

    Attributes:
        name: the linears.
        before, after: images of the float model and of the run, a row for each block and a column for each channel.
        full: multiple of the block's median at which a channel has full opacity.
        worst: the block with the largest outlier in the float model.
        profile: chart of that block's channels.
        summary: median outlier factors.
    """

    name: str
    before: str
    after: str
    full: float
    worst: int
    profile: Markup | None
    summary: str


def site_name(key: str) -> str:
    """Names of linears, with their common parent factored out.

    >>> site_name("self_attn.q_proj+self_attn.k_proj"), site_name("mlp.down_proj")
    ('self_attn: q_proj, k_proj', 'mlp: down_proj')
    """
    names = [name.rpartition(".") for name in key.split("+")]
    parent = names[0][0]
    return f"{parent}: {', '.join(name for _, _, name in names)}" if parent else ", ".join(n for _, _, n in names)


def standing_out(peaks: Array) -> Array:
    """Each channel's largest activation over the median channel's, ``(blocks, in)``.

    >>> standing_out(np.array([[1.0, 2.0, 8.0]])).tolist()
    [[0.5, 1.0, 4.0]]
    """
    return peaks / np.maximum(np.median(peaks, 1, keepdims=True), 1e-12)


def sites(run: RunFacts, style: int = 0) -> list[Site]:
    """One entry for each input shared by linears; ``style`` is the run's colour."""
    return [_site(run.name, style, key, before, after) for key, (before, after) in run.peaks.items()]


def _site(run: str, style: int, key: str, before: Array, after: Array) -> Site:
    name, ratios = site_name(key), [standing_out(peaks) for peaks in (before, after)]
    full = min(max(2.0, *(float(ratio.max()) for ratio in ratios)), FULL)
    worst = int(ratios[0].max(1).argmax())
    images = [strengths(np.log2(np.maximum(pooled(ratio), 1)) / np.log2(full)) for ratio in ratios]
    step = before.shape[1] / pooled(before).shape[1]
    profile = lines(
        f"{name}, block {worst}: largest activation of each channel, float model and {run}",
        [
            Series(who, [(i * step, float(v)) for i, v in enumerate(pooled(peaks)[worst])], colour)
            for who, peaks, colour in (("float model", before, "float"), (run, after, style))
        ],
        "channel",
        f"largest |x|, block {worst}",
        log=True,
        dots=False,
    )
    factors = " to ".join(f"{short(float(np.median(ratio.max(1))))}×" for ratio in ratios)
    return Site(name, images[0], images[1], full, worst, profile, f"largest channel over the median one: {factors}")


def pooled(peaks: Array) -> Array:
    """``(blocks, in)`` max-pooled to at most ``COLUMNS`` columns."""
    width = min(COLUMNS, peaks.shape[1])
    starts = np.arange(width) * peaks.shape[1] // width
    return np.maximum.reduceat(peaks, starts, axis=1)


def comparison(runs: Sequence[RunFacts]) -> list[tuple[str, Markup | None]]:
    """Charts of the largest channel over the median one by block, for each input shared by linears, in all runs."""
    charts = []
    for key in dict.fromkeys(key for run in runs for key in run.peaks):
        with_peaks = [(index, run) for index, run in enumerate(runs) if key in run.peaks]
        series = [Series("float model", _by_block(with_peaks[0][1].peaks[key][0]), "float")]
        series += [Series(run.name, _by_block(run.peaks[key][1]), index) for index, run in with_peaks]
        label = f"{site_name(key)}: largest channel over the median one, by block"
        charts.append((site_name(key), lines(label, series, "block", "largest over median channel", log=True)))
    return charts


def _by_block(peaks: Array) -> list[tuple[float, float]]:
    return [(float(block), float(value)) for block, value in enumerate(standing_out(peaks).max(1))]
