"""Perplexity of formats by recipes on SmolLM2-135M-Instruct, written into ``docs/formats.md`` between its markers.

    python benchmarks/formats.py [--calibration FILE] [--evaluation FILE] [--only SCHEME ...] [--recipe NAME ...]

Without files both texts are built in. Cheap recipes are measured first, for all schemes, and the table is written
after every row. Rows are kept in ``docs/measured/formats``: an interrupted command goes on, and a command that is
restricted to some rows keeps the others in the table. Missing rows come first, then those that other sources have
measured; ``--missing`` leaves the latter as they are, and ``--fresh`` measures all again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import ROOT, found, kept, lowbit, missing_first, outdated, put, text_identity

MEASURED = ROOT / "docs" / "measured" / "formats"
PAGE = ROOT / "docs" / "formats.md"
BEGIN, END = "<!-- perplexity: made by benchmarks/formats.py -->\n", "<!-- /perplexity -->"
MODEL = "demo"
SAMPLES, CALIBRATION_LENGTH, SEED = 64, 256, 0
LENGTH, TOKENS = 512, 16384
EFFORT = "quick"

# Those that fit widths of 576 and 1536, by bits; K-quants need multiples of 256, ``fp8-block`` inputs of 128.
SCHEMES = (
    "q2_0",
    "mxfp4",
    "mxfp4a16",
    "nvfp4",
    "nvfp4a16",
    "w4a16g32-sym",
    "w4afp8",
    "iq4_nl",
    "mxfp6a16",
    "fp8",
    "fp8-blocka16",
    "mxfp8",
)
# Columns: the recipe and its settings.
RECIPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "rtn": ("rtn", ()),
    "rtn+search": ("rtn", ("rtn.search=true",)),
    "gptq": ("gptq", ()),
    "awq+gptq": ("awq+gptq", ()),
    "affinequant+gptq": ("affinequant+gptq", ()),
}
FLOAT = "float"
CELLS = [("", FLOAT), *((scheme, recipe) for scheme in SCHEMES for recipe in RECIPES)]


@dataclass(frozen=True)
class Protocol:
    """The texts of all rows: ``--data`` of ``lowbit quantize`` and of ``lowbit evaluate``."""

    calibration: str
    evaluation: str

    def key(self, scheme: str, recipe: str) -> tuple[object, ...]:
        """What identifies a row."""
        texts = (text_identity(self.calibration), text_identity(self.evaluation))
        return (*texts, MODEL, SAMPLES, CALIBRATION_LENGTH, SEED, LENGTH, TOKENS, EFFORT, scheme, recipe)

    def measure(self, scheme: str, recipe: str) -> dict[str, Any]:
        """One row: quantize, weigh the files, evaluate, forget the folder; of ``float`` the perplexity alone."""
        if recipe == FLOAT:
            return {"perplexity": self._perplexity(MODEL)}
        name, settings = RECIPES[recipe]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            what = ["--scheme", scheme, "--recipe", name, "--data", self.calibration, "--effort", EFFORT]
            drawn = ["--samples", str(SAMPLES), "--length", str(CALIBRATION_LENGTH), "--seed", str(SEED)]
            options = [part for setting in settings for part in ("--set", setting)]
            made = lowbit("quantize", MODEL, "--out", str(folder), *what, *drawn, *options)
            row = {name: made[name] for name in ("bits_per_weight", "seconds", "warnings")}
            row["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            return {**row, "perplexity": self._perplexity(str(folder))}

    def _perplexity(self, target: str) -> float:
        how = ["--data", self.evaluation, "--length", str(LENGTH), "--tokens", str(TOKENS)]
        (perplexity,) = lowbit("evaluate", target, *how)["perplexity"].values()
        return float(perplexity)

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """All measured rows, by scheme and recipe."""
        rows = {cell: found(MEASURED, self.key(*cell), any_code=True) for cell in CELLS}
        return {cell: row for cell, row in rows.items() if row is not None}


def table(protocol: Protocol, rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The measured rows as Markdown, one line for each scheme, empty cells where nothing is measured."""
    exact = rows["", FLOAT]["perplexity"]
    earlier = outdated(MEASURED, (protocol.key(*cell) for cell in CELLS))
    lines = [
        f"SmolLM2-135M-Instruct; `--effort {EFFORT}`. Calibration: {SAMPLES} x {CALIBRATION_LENGTH} tokens of",
        f"{_named(protocol.calibration)}, seed {SEED}. Perplexity: {TOKENS} tokens of {_named(protocol.evaluation)}",
        f"in windows of {LENGTH}; the float model has {exact:.2f}. MB are those of the run folder's weight files;",
        f"embeddings and head stay in float. Made by `make formats`. {earlier}".rstrip(),
        "",
        _line(["scheme", "bits per weight", "MB", *(f"`{name}`" for name in RECIPES)]),
        "|---|" + "---:|" * (len(RECIPES) + 2),
    ]
    for scheme in SCHEMES:
        own = {recipe: rows[scheme, recipe] for recipe in RECIPES if (scheme, recipe) in rows}
        if own:
            bits, size = (max(row[name] for row in own.values()) for name in ("bits_per_weight", "bytes"))
            cells = [f"{own[recipe]['perplexity']:.2f}" if recipe in own else "" for recipe in RECIPES]
            lines.append(_line([f"`{scheme}`", f"{bits:.3f}", f"{size / 1e6:.0f}", *cells]))
    return "\n".join([*lines, ""])


def _named(text: str) -> str:
    """A text without its folder.

    >>> _named("texts/wiki.test.raw"), _named("builtin")
    ('`wiki.test.raw`', 'the built-in text')
    """
    return f"`{Path(text).name}`" if Path(text).suffix else f"the {text.replace('builtin', 'built-in')} text"


def _line(cells: list[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", default="builtin", help="text file, or a name that lowbit quantize takes")
    parser.add_argument("--evaluation", default="builtin", help="text file, or a name that lowbit evaluate takes")
    parser.add_argument("--only", action="append", choices=SCHEMES, help="measure only this scheme; repeatable")
    parser.add_argument("--recipe", action="append", choices=[*RECIPES], help="measure only this recipe; repeatable")
    parser.add_argument("--missing", action="store_true", help="leave rows of other sources as they are")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args()
    protocol = Protocol(options.calibration, options.evaluation)
    kept(MEASURED, protocol.key("", FLOAT), lambda: protocol.measure("", FLOAT), options.fresh)
    asked = [(scheme, recipe) for recipe in options.recipe or RECIPES for scheme in options.only or SCHEMES]
    for cell in missing_first(MEASURED, asked, lambda cell: protocol.key(*cell)):
        if options.missing and found(MEASURED, protocol.key(*cell), any_code=True) is not None:
            continue

        def measure(cell: tuple[str, str] = cell) -> dict[str, Any]:
            return protocol.measure(*cell)

        row = kept(MEASURED, protocol.key(*cell), measure, options.fresh)
        print(json.dumps({"scheme": cell[0], "recipe": cell[1], "perplexity": row["perplexity"]}), flush=True)
        PAGE.write_text(put(PAGE.read_text(), table(protocol, protocol.rows()), BEGIN, END, PAGE))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
