"""What ``lowbit inspect`` predicts of a run, against the run: for docs/scale.md.

    python benchmarks/scale.py [--model demo] [--samples 16] [--length 256] [--ranks 1 2] [--only gptq] [--json FILE]

Each case runs in processes of its own, one thread each. Compared are the processor's seconds of the busiest process,
which other programs on the machine disturb less than the time of day, and its peak resident memory. Rates are
measured before each case. What a process does before and behind its blocks (text, files, digests) is not predicted;
``rtn`` shows how much that is, as hardly anything else takes its time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.checkpoints.resolve import load_config, resolve
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.estimate import Calibration, Model, estimate, with_own_rates
from lowbit.pipeline.machine import Machine
from lowbit.pipeline.recipe import load_recipe, with_effort, with_settings
from lowbit.quant.scheme_files import load_scheme
from lowbit.runs.plan import make_plan

LEARNED = ("affinequant.epochs=1", "affinequant.batch=4", "affinequant.micro_batch=1", "affinequant.signs=false")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "rtn": ("w4a16g64-sym", ()),
    "smoothquant": ("w4a8", ()),
    "gptq": ("w4a16g64-sym", ()),
    "awq": ("w4a16g64-sym", ()),
    "affinequant": ("w4a8", LEARNED),
}
WORK = """
import json, sys, time
import lowbit
from lowbit.pipeline.runner import peak_memory_bytes
model, out, recipe, scheme, samples, length, *settings = sys.argv[1:]
import lowbit.pipeline.quantize
began = time.process_time()
lowbit.quantize(model, out, recipe=recipe, scheme=scheme, samples=int(samples), length=int(length), settings=settings)
print(json.dumps({"seconds": time.process_time() - began, "bytes": peak_memory_bytes()}), flush=True)
"""


def measured(recipe: str, ranks: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of the busier process."""
    scheme, settings = CASES[recipe]
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "work.py"
        script.write_text(WORK)
        launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run"]
        launch += [] if ranks == 1 else ["--nproc-per-node", str(ranks)]
        arguments = [
            options.model,
            f"{name}/out",
            recipe,
            scheme,
            str(options.samples),
            str(options.length),
            *settings,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, str(script), *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {key: max(row[key] for row in rows) for key in ("seconds", "bytes")}


def predicted(skeleton: Skeleton, recipe: str, ranks: int, options: argparse.Namespace) -> dict[str, float]:
    """The same by ``inspect``, without what processes exchange, which takes no processor's time."""
    scheme, settings = CASES[recipe]
    model = Model.of(skeleton, make_plan(skeleton, load_scheme(scheme)))
    steps = with_settings(with_effort(load_recipe(recipe), "normal"), settings)
    calibration = Calibration(options.samples, options.length)
    machine = with_own_rates(Machine(None, ranks=ranks), model, calibration)
    assert machine.rates is not None
    found = estimate(model, steps, calibration, replace(machine, rates=replace(machine.rates, network=1e30)))
    return {"seconds": found.total_seconds or 0.0, "bytes": float(found.needs.of("host"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    skeleton = Skeleton(load_config(resolve(options.model).folder))
    rows: list[dict[str, Any]] = []
    print(f"{'':12} {'ranks':>5} {'predicted s':>12} {'measured s':>11} {'predicted MB':>13} {'measured MB':>12}")
    for recipe in options.only:
        for ranks in options.ranks:
            ours, real = predicted(skeleton, recipe, ranks, options), measured(recipe, ranks, options)
            rows.append({"recipe": recipe, "ranks": ranks, "predicted": ours, "measured": real})
            print(
                f"{recipe:12} {ranks:>5} {ours['seconds']:>12.1f} {real['seconds']:>11.1f} "
                f"{ours['bytes'] / 1e6:>13.0f} {real['bytes'] / 1e6:>12.0f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
