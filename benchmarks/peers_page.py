"""The measured part of ``docs/peers.md``: a table for each scheme, and where another tool is ahead."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.data.windows import Tokens
from rows import filled, line, spread

FLOAT = "float"
Figures = Mapping[str, Any]
Rows = Mapping[tuple[str, str, int], Figures]  # by scheme, entry, seed


@dataclass(frozen=True)
class Page:
    """What is measured, and how.

    Attributes:
        drawn: the calibration tokens of each seed.
        steps: of tools that learn.
        exact: the float model's figures.
        rows: all others that there are.
        schemes, tools, recipes: their order; of rows that are not measured there is no line.
        beside: recipes that were given other tokens too: they have lines, and are not compared with the tools.
    """

    drawn: Sequence[Tokens]
    steps: int
    exact: Figures
    rows: Rows
    schemes: Sequence[str]
    tools: Sequence[str]
    recipes: Sequence[str]
    beside: Sequence[str] = ()

    def text(self) -> str:
        """All that is measured, in Markdown."""
        lines = [*self._facts()]
        for scheme in self.schemes:
            if any(scheme == own for own, _, _ in self.rows):
                lines += [f"### {scheme}", "", *self.table(scheme), "", *self.ahead(scheme), ""]
        return "\n".join(lines)

    def _facts(self) -> Iterator[str]:
        """What the figures depend on."""
        first, texts = self.drawn[0], self.exact["texts"]
        sizes = "; ".join(f"{_name(name)}, {text['tokens']} tokens" for name, text in texts.items())
        digests = ", ".join(f"`{tokens.hash[:12]}`" for tokens in self.drawn)
        for words in (
            f"Calibration: {len(first.ids)} x {first.ids.shape[1]} tokens of {first.corpus}, seeds 0 to "
            f"{len(self.drawn) - 1}, mean ± standard deviation. Hashes of the tokens, by seed: {digests}.",
            f"Tools that learn: {self.steps} steps.",
            f"Evaluation in windows of {self.exact['protocol']['length']} tokens: {sizes}.",
            f"Versions: {self._versions()}.",
        ):
            yield filled(words, "* ")
        yield ""

    def _versions(self) -> str:
        """Of the tools and of ``lowbit``, each with the libraries beside it."""
        found = {}
        for (_, entry, _), row in self.rows.items():
            own = ", ".join(f"{name} {version}" for name, version in sorted(row["versions"].items()))
            found[entry.split()[0].rstrip(",") if entry in self.tools else "lowbit"] = own
        return "; ".join(f"{name} ({own})" for name, own in sorted(found.items()))

    def seeds(self, scheme: str, entry: str) -> list[Figures]:
        """The measured rows of an entry."""
        return [row for (own, name, _), row in sorted(self.rows.items()) if (own, name) == (scheme, entry)]

    def table(self, scheme: str) -> list[str]:
        """The rows of a scheme; those with fewer seeds than the page say so."""
        texts = self.exact["texts"]
        heads = ["", "bits/weight", *(head for name in texts for head in (f"{_name(name)}, perplexity", "KL"))]
        lines = [line([*heads, "worst x float", "CPU, s"]), "|---|" + "---:|" * (len(heads) + 1)]
        exact = [cell for text in texts.values() for cell in (f"{text['perplexity']:.3f}", "0.0000")]
        lines.append(line([FLOAT, "32", *exact, "1.000", "-"]))
        for entry in (*self.tools, *self.recipes, *self.beside):
            if not (seeds := self.seeds(scheme, entry)):
                continue
            name = entry if entry in self.tools else f"`{entry}`"
            few = f" ({len(seeds)} of {len(self.drawn)} seeds)" if len(seeds) < len(self.drawn) else ""
            cells = [name + few, f"{seeds[0]['bits_per_weight']:.3f}"]
            for text in texts:
                cells.append(spread(_values(seeds, text, "perplexity"), 3))
                cells.append(spread(_values(seeds, text, "kl_mean"), 4))
            worst = [max(text["runs"][0]["ratio"] for text in seed["texts"].values()) for seed in seeds]
            lines.append(line([*cells, spread(worst, 3), f"{_cpu(seeds):.0f}"]))
        return lines

    def ahead(self, scheme: str) -> list[str]:
        """For each tool the figures in which no recipe beats it at no more of its CPU time.

        A figure is a mean over seeds. A recipe that costs more does not count, however good it is.
        """
        ours = {recipe: self.seeds(scheme, recipe) for recipe in self.recipes}
        lines = []
        for tool in self.tools:
            if not (theirs := self.seeds(scheme, tool)):
                continue
            within = {name: rows for name, rows in ours.items() if rows and _cpu(rows) <= _cpu(theirs)}
            if not within:
                lines.append(f"* **{tool}**: no recipe takes as little CPU time.")
                continue
            told = [self._beaten(text, key, theirs, within) for text in self.exact["texts"] for key in FIGURES]
            behind = [one for one in told if one]
            count = (
                f"the {len(within)} recipes that take" if len(within) > 1 else f"`{next(iter(within))}`, which takes"
            )
            verdict = f"is ahead in {'; '.join(behind)}" if behind else "is behind in every figure"
            lines.append(f"* **{tool}** {verdict}, beside {count} no more CPU time.")
        return lines

    def _beaten(self, text: str, key: str, theirs: list[Figures], ours: Mapping[str, list[Figures]]) -> str | None:
        """A figure in which a tool is ahead of all ``ours``, in words; ``None`` where it is not."""
        label, digits = FIGURES[key]
        own = statistics.fmean(_values(theirs, text, key))
        means = {name: statistics.fmean(_values(rows, text, key)) for name, rows in ours.items()}
        best = min(means, key=means.__getitem__)
        if means[best] < own:
            return None
        return f"{label} on {_name(text)} ({own:.{digits}f}, `{best}` {means[best]:.{digits}f})"


FIGURES = {"perplexity": ("perplexity", 3), "kl_mean": ("KL", 4)}  # by key: the words, and digits


def _values(seeds: Sequence[Figures], text: str, key: str) -> list[float]:
    return [float(seed["texts"][text]["runs"][0][key]) for seed in seeds]


def _cpu(seeds: Sequence[Figures]) -> float:
    return statistics.fmean(float(seed["cpu_seconds"]) for seed in seeds)


def _name(text: str) -> str:
    """A text without its folder.

    >>> _name("texts/wiki.test.raw"), _name("builtin:c4")
    ('wiki.test.raw', 'builtin:c4')
    """
    return Path(text).name
