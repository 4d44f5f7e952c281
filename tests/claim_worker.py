"""One of the processes of ``test_claim.py``; with ``stuck`` it claims its first block and never finishes it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import lowbit
from lowbit.pipeline.runner import Walk


def run(model: Path, out: Path, recipe: str, claim: bool) -> None:
    """The run that all of them make."""
    text, scheme = str(model / "calib.txt"), "w4a16g16-sym"
    lowbit.quantize(str(model), out, scheme=scheme, recipe=recipe, data=text, samples=6, length=12, claim=claim)


if __name__ == "__main__":
    model, out, recipe, how = sys.argv[1:]
    if how == "stuck":

        def write(self, block, *rest):
            (out_file := Path(f"{out}.stuck")).write_text(str(block.start))
            while out_file.exists():
                time.sleep(0.1)

        Walk.write = write
    run(Path(model), Path(out), recipe, claim=True)
