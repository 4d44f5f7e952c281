"""Perplexity over several texts: each run's mean and worst ratio to its float model, and where texts part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.evaluation.ratios import Ratios, ratios_of
from lowbit.reports.facts import FloatFacts, RunFacts
from lowbit.reports.scores import question

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class OverTexts:
    """A run's ratios over the texts of one protocol.

    Attributes:
        run: the run's name.
        protocol: tokens in a window, what windows start with, and the simulated runtime, in words.
        ratios: by the texts' names.
    """

    run: str
    protocol: str
    ratios: Ratios


def over_texts(run: RunFacts, floats: Sequence[FloatFacts]) -> list[OverTexts]:
    """A run's ratios for each protocol under which it and its float model were measured on two texts or more.

    Of a text that was measured on several numbers of tokens, the largest counts; ``builtin`` is ``builtin:wiki``.
    Texts of one name and number of tokens whose digests differ are several texts.
    """
    whose = run.manifest.identity.fingerprint
    own = [model for model in floats if model.fingerprint == whose]
    exact = {question(result): result["value"] for model in own for result in model.scores}
    groups: dict[str, dict[str, list[tuple[Entry, float]]]] = {}
    for result in _perplexities(run.scores):
        if (unit := exact.get(question(result))) is None:
            continue
        name = "builtin:wiki" if result["on"] == "builtin" else result["on"]
        groups.setdefault(_protocol(result), {}).setdefault(name, []).append((result, unit))
    by_text = {protocol: _texts(group) for protocol, group in groups.items()}
    return [
        OverTexts(
            run.name,
            protocol,
            ratios_of(
                {name: result["value"] for name, (result, _) in group.items()},
                {name: unit for name, (_, unit) in group.items()},
            ),
        )
        for protocol, group in sorted(by_text.items())
        if len(group) > 1
    ]


def _texts(group: Mapping[str, Sequence[tuple[Entry, float]]]) -> dict[str, tuple[Entry, float]]:
    """One result for each text: the digest tells texts of a name apart that were measured on as many tokens."""
    out = {}
    for name, found in group.items():
        longest = max(_tokens(result) for result, _ in found)
        digests = {result["protocol"]["hash"]: (result, unit) for result, unit in found if _tokens(result) == longest}
        for digest, one in digests.items():
            out[name if len(digests) == 1 else f"{name} ({digest[:8]})"] = one
    return out


def _perplexities(results: Sequence[Entry]) -> Iterator[Entry]:
    """Perplexities of texts, those that are not finite as infinite."""
    for result in results:
        if result["measure"] == "perplexity" and {"tokens", "length", "bos", "hash"} <= set(result["protocol"]):
            yield result if result["value"] is not None else {**result, "value": float("inf")}


def _protocol(result: Entry) -> str:
    protocol, runtime = result["protocol"], result["runtime"]
    inputs = f", inputs quantized as on {runtime}" if runtime else ""
    precision = f", {protocol['dtype']}" if "dtype" in protocol else ""  # float32 is not told
    return f"windows of {protocol['length']}, bos {protocol['bos']}{precision}{inputs}"


def _tokens(result: Entry) -> int:
    return int(result["protocol"]["tokens"])
