"""Where runs lose more than their float model on a text that they were not calibrated on; ``docs/generalization.md``.

    python benchmarks/generalization.py MODEL DIR [DIR ...] --calibration TEXT [--data TEXT ...]

For each run folder and text: loss by kind of token, by position and by what the calibration tokens had shown; ranges
of inputs; errors of hidden states block by block. ``--calibration`` is the text that the runs were calibrated on, as
for ``lowbit quantize``: its tokens are drawn again, and checked. The tables stand between two markers of the page.
Finished rows are kept in ``build/generalization`` by the run's manifest and by the sources that measured them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from generalization_measure import measure
from generalization_page import measured
from lowbit.errors import LowbitError
from lowbit.runs.manifest import MANIFEST
from rows import ROOT, digest, kept, put, sources

BUILD = ROOT / "build" / "generalization"
PAGE = ROOT / "docs" / "generalization.md"
BEGIN, END = "<!-- measured: made by benchmarks/generalization.py -->\n", "<!-- /measured -->"
HERE = Path(__file__).parent
CODE = (HERE / "generalization_measure.py", HERE / "token_kinds.py")


def row(options: argparse.Namespace, run: Path, text: str) -> dict[str, Any]:
    """Figures of a run on a text, from ``build/generalization`` or measured now."""
    if not (run / MANIFEST).exists():
        raise SystemExit(f"{run} is no finished run folder: give what lowbit quantize wrote")
    what = (options.model, digest([run / MANIFEST]), options.calibration, text, options.length, options.tokens)

    def measured_now() -> dict[str, Any]:
        return measure(options.model, run, options.calibration, text, options.length, options.tokens)

    return kept(BUILD, what, measured_now, options.fresh, sources() + digest(CODE))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="the float model, as for lowbit quantize")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--calibration", required=True, help="text that the runs were calibrated on")
    parser.add_argument("--data", action="append", help="text to measure on; repeatable (builtin:c4)")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text at most")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args()
    rows = []
    try:
        for run in options.runs:
            for text in options.data or ("builtin:c4",):
                rows.append(row(options, run, text))
                told = {key: rows[-1][key] for key in ("recipe", "scheme", "perplexity", "float_perplexity")}
                print(json.dumps({"run": str(run), "text": text, **told}), flush=True)
                page = options.page.read_text(encoding="utf-8")
                options.page.write_text(put(page, measured(rows), BEGIN, END, options.page), encoding="utf-8")
    except LowbitError as error:
        raise SystemExit(str(error)) from error
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
