"""Methods by schemes on SmolLM2-135M-Instruct, written to ``docs/results.md``.

    python benchmarks/results.py [--wikitext2 FOLDER] [--ptb FILE] [--seeds 3] [--scheme NAME ...] [--recipe NAME ...]

Each scheme is a table of its own, since rows of different protocols do not compare: the float model first, then the
recipes. All are measured on the built-in texts, by perplexity and token by token against the float model, always with
one of a kind that was not calibrated on; ``--wikitext2`` names a folder with the raw texts ``wiki.valid.raw`` (then
the calibration text) and ``wiki.test.raw`` (then the first text), ``--ptb`` one more text. LAMBADA's last words come
from lm-eval; ``--lambada 0`` leaves them out. Four rows are compared at once, and the page is written behind them.
Finished rows are kept in ``docs/measured/results``: an interrupted command goes on, and a command restricted to some
rows keeps the others in the page. Missing rows come first, then those that other sources have measured; ``--missing``
leaves the latter as they are, and ``--fresh`` measures all again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from results_page import page
from results_protocol import FLOAT, MEASURED, ROWS, Cell, Protocol, cells, protocol_of
from rows import ROOT, found, kept, missing_first, together


def measured(protocol: Protocol, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Rows that are measured now, and kept."""
    out = []
    for cell, row in zip(cells, protocol.measure(cells), strict=True):
        out.append(kept(MEASURED, protocol.key(cell), partial(dict, row), fresh=True))
        told: dict[str, object] = dict(zip(("scheme", "recipe", "seed"), cell, strict=True))
        told["perplexity"] = [text["runs"][0]["perplexity"] for text in row["texts"].values()]
        print(json.dumps(told), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wikitext2", type=Path, help="folder with wiki.valid.raw and wiki.test.raw")
    parser.add_argument("--ptb", type=Path, help="text file with the test split of PTB")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text at most")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds of each row, from 0")
    parser.add_argument("--lambada", type=int, default=100, help="documents of LAMBADA; 0 for none")
    parser.add_argument("--task-data", default="auto", help="of LAMBADA, as for lowbit evaluate")
    parser.add_argument("--scheme", action="append", choices=[*ROWS], help="measure only this table; repeatable")
    every = sorted({recipe for recipes in ROWS.values() for recipe in recipes})
    parser.add_argument("--recipe", action="append", choices=every, help="measure only this recipe; repeatable")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--missing", action="store_true", help="leave rows of other sources as they are")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands: CPU seconds of several threads include their waiting
    protocol = protocol_of(options.wikitext2, options.ptb, options.tokens, options.lambada, options.task_data)
    alone: Cell = ("-", FLOAT, 0)
    exact = None if options.fresh else found(MEASURED, protocol.key(alone), any_code=options.missing)
    if exact is None:
        (exact,) = measured(protocol, [alone])

    def wanted(cell: Cell) -> bool:
        return options.fresh or found(MEASURED, protocol.key(cell), any_code=options.missing) is None

    asked = list(filter(wanted, cells(options.scheme or ROWS, options.recipe or (), options.seeds)))
    for part in together(missing_first(MEASURED, asked, protocol.key)):
        measured(protocol, part)
        options.out.write_text(page(protocol, exact, protocol.rows(options.seeds), options.seeds))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
