"""Probes: a handful of single changes whose divergence is measured, to correct what the curvature predicts.

The second-order estimate leaves out correlations between errors, and higher orders, which count where a format is
coarse. How much depends above all on the format, so each format has a factor: the geometric mean of measured over
predicted divergence of its probes, drawn towards the mean of all formats by one more probe of that value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lowbit.allocation.divergence import divergences
from lowbit.allocation.losses import Losses
from lowbit.exporters.footprint import Choice, Footprint
from lowbit.quant.format import Format
from lowbit.quant.scheme_names import override_text
from lowbit.runs.streamed_model import StreamedModel

QUANTILES = (0.35, 0.9)  # of a format's choices in the order of their expected divergence
LEAST = 1e-7  # nats per token; below, float32 measures its own rounding errors


@dataclass(frozen=True)
class Probe:
    """One choice in one format, and its expected divergence."""

    choice: Choice
    format: Format
    expected: float


def probes_of(footprint: Footprint, losses: Losses, blocks_at: str) -> list[Probe]:
    """Two probes for every format that some choice has."""
    by_format: dict[str, list[Probe]] = {}
    for choice in footprint.choices:
        for option in choice.options:
            if option.format is not None:
                probe = Probe(choice, option.format, losses.of(choice, option.format, blocks_at))
                if probe.expected > LEAST:
                    by_format.setdefault(override_text(option.format), []).append(probe)
    out = []
    for found in by_format.values():
        found.sort(key=lambda probe: probe.expected)
        places = dict.fromkeys(round(share * (len(found) - 1)) for share in QUANTILES)
        out += [found[place] for place in places]
    return out


def with_probes(
    losses: Losses,
    footprint: Footprint,
    model: StreamedModel,
    columns: Mapping[str, Tensor],
    ids: Tensor,
) -> Losses:
    """``losses`` with factors from probes measured on ``ids``."""
    probes = probes_of(footprint, losses, model.skeleton.architecture.blocks)
    assignments = [dict.fromkeys(probe.choice.modules, probe.format) for probe in probes]
    return replace(losses, factors=factors_of(probes, divergences(model, assignments, columns, ids)))


def factors_of(probes: Sequence[Probe], measured: Sequence[float]) -> dict[str, float]:
    """Each format's factor.

    Two probes of one format that measure 4 and 1 times what was expected, and none of another: the mean is 2, and
    the format's own is ``(4 * 1 * 2)^(1/3) = 2``.
    """
    ratios: dict[str, list[float]] = {}
    for probe, found in zip(probes, measured, strict=True):
        if probe.expected > LEAST and found > LEAST:
            ratios.setdefault(override_text(probe.format), []).append(math.log(found / probe.expected))
    every = [ratio for own in ratios.values() for ratio in own]
    mean = sum(every) / len(every) if every else 0.0
    return {text: math.exp((sum(own) + mean) / (len(own) + 1)) for text, own in ratios.items()}
