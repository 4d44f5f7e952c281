"""Perplexities of a run as ratios to its float model's, over several texts.

A perplexity on the kind of text that was calibrated on hides that a model is broken for other text: one run has 1.5
times the float model's perplexity on English and 150 times on a page in Chinese. So the worst ratio stands beside the
mean, and texts whose ratios part are told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PARTED = 1.5  # the worst ratio, as a multiple of the best, from which texts part


@dataclass(frozen=True)
class Ratios:
    """Ratios of perplexities to the float model's.

    Attributes:
        by_text: the ratio on each text, by name; infinite or NaN where the run's perplexity is.
        mean: their geometric mean: ``exp`` of the mean loss in nats a token, texts counting alike.
        best, worst: names of the texts with the least and the largest ratio.
        parted: whether the worst ratio is above ``PARTED`` times the best.
    """

    by_text: dict[str, float]
    mean: float
    best: str
    worst: str
    parted: bool

    def line(self) -> str:
        """The mean and the worst ratio in words.

        >>> ratios_of({"wiki": 30.0, "code": 5.4}, {"wiki": 25.0, "code": 4.0}).line()
        'perplexity over 2 texts: 1.2728 times the float model in the mean, 1.3500 times on code, the worst'
        """
        worst = f"{self.by_text[self.worst]:.4f} times on {Path(self.worst).name}, the worst"
        return (
            f"perplexity over {len(self.by_text)} texts: {self.mean:.4f} times the float model in the mean, {worst}"
        )

    def warning(self) -> str | None:
        """A line on texts that part; ``None`` if they do not.

        >>> ratios_of({"wiki": 30.0, "code": 8.0}, {"wiki": 25.0, "code": 4.0}).warning()
        'code has 2 times the float perplexity, wiki 1.2 times: calibrate on text like code too'
        """
        if not self.parted:
            return None
        worst, best = (f"{self.by_text[name]:.3g}" for name in (self.worst, self.best))
        low, high = Path(self.best).name, Path(self.worst).name
        return f"{high} has {worst} times the float perplexity, {low} {best} times: calibrate on text like {high} too"


def ratios_of(run: Mapping[str, float], exact: Mapping[str, float]) -> Ratios:
    """The ratios of a run's perplexities to the float model's, on the same texts.

    Args:
        run, exact: perplexities by text; at least one.

    >>> found = ratios_of({"wiki": 30.0, "code": 5.4}, {"wiki": 25.0, "code": 4.0})
    >>> found.worst, round(found.mean, 4), found.parted  # sqrt(1.2 x 1.35); 1.35 is 1.125 times 1.2
    ('code', 1.2728, False)
    """
    by_text = {name: value / exact[name] for name, value in run.items()}
    # What is not finite is worst: NaN has no order of its own.
    order = sorted(by_text, key=lambda name: by_text[name] if math.isfinite(by_text[name]) else math.inf)
    best, worst = by_text[order[0]], by_text[order[-1]]
    parted = math.isfinite(best) and not worst <= PARTED * best
    # A float model that diverges gives ratios of 0 or NaN, which have no mean.
    logs = [math.log(ratio) if ratio > 0 else math.nan for ratio in by_text.values()]
    mean = math.exp(sum(logs) / len(logs))
    return Ratios(by_text, mean, order[0], order[-1], parted)
