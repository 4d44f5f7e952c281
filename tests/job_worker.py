"""What each process of a job runs in ``test_processes.py``: the runs of a JSON file, one after the other.

With ``stuck`` in the file, the first process never writes block 1.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lowbit
from lowbit.pipeline.recipe import recipe_from_dict
from lowbit.pipeline.runner import Walk


def make(run: dict[str, Any], model: str, out: Path) -> None:
    """One run: ``scheme``, ``overrides`` and ``steps``, into ``out``."""
    recipe = recipe_from_dict({"steps": run["steps"]}, run["name"])
    text = str(Path(model) / "calib.txt")
    what = {"scheme": run["scheme"], "recipe": recipe, "overrides": run["overrides"]}
    lowbit.quantize(model, out, **what, data=text, samples=20, length=12)


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    if job.get("stuck"):
        real = Walk.write

        def write(self: Walk, block: Any, *rest: Any) -> None:
            while block.start == 1:
                time.sleep(0.1)
            real(self, block, *rest)

        Walk.write = write  # type: ignore[method-assign]
    for run in job["runs"]:
        make(run, run["model"], Path(job["out"]) / run["name"])
