"""What one optimisation step of AffineQuant costs, against a plain float forward and backward of the same block.

    python benchmarks/fit_step.py [--device cuda] [--tokens 2048] [--rounds 9] [--json FILE]

Both sides run the first block of SmolLM2-135M-Instruct on the same tokens, in turns within one process; the ratio is
that of the medians. The plain side makes gradients for all the block's parameters; a step of the fit adds maps,
inverses, quantizers, their gradients, the optimiser and the projections. Fails if a ratio is above 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbit.block import Block, Calib, run, run_all
from lowbit.checkpoint import Checkpoint, block_params
from lowbit.data import calibration
from lowbit.learn import Adam
from lowbit.methods.affinequant import AffineQuant, Trainer
from lowbit.scheme import parse_scheme
from lowbit.skeleton import Skeleton
from lowbit.source import load_config, load_tokenizer, resolve

ALLOWED = 2.0
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "omniquant w4a4": ("w4a4", {"heads": "diagonal", "qk": "diagonal", "channels": "off"}),
    "affinequant w4a4": ("w4a4", {}),
    "affinequant w3a16": ("w3a16-asym", {}),
    "affinequant w2a16g64": ("w2a16g64-asym", {}),
    "affinequant w4a4, float-double": ("w4a4", {"precision": "float-double"}),
}


def first_block(tokens: int, device: str) -> tuple[Block, Calib]:
    """Block 0 with its input for ``tokens`` tokens of built-in text in sequences of 256."""
    folder = resolve("demo").folder
    skeleton, checkpoint = Skeleton(load_config(folder)), Checkpoint(folder)
    skeleton.fill({n: value.float().to(device) for n, value in checkpoint.read(skeleton.rest_names).items()})
    skeleton.model.to(device)
    ids = calibration("builtin", load_tokenizer(folder), tokens // 256, 256, 0).ids.to(device)
    x = skeleton.start(ids)
    params = block_params(checkpoint, skeleton.family.blocks, 0, skeleton.layers[0])
    block = skeleton.block(0, {name: value.to(device) for name, value in params.items()})
    return block, Calib(x, x, run_all(block, x))


def seconds(work: Callable[[], None], device: str) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    block, calib = first_block(options.tokens, options.device)
    everything = torch.arange(len(calib.x_q))
    params = {name: value.clone().requires_grad_() for name, value in block.params.items()}

    def plain() -> None:
        for value in params.values():
            value.grad = None
        (run(block, calib.x_q, params) - calib.y_fp).square().mean().backward()

    rows: list[dict[str, Any]] = []
    for name, (scheme, settings) in CASES.items():
        trainer = Trainer(AffineQuant(**settings), block, calib, parse_scheme(scheme))
        trainer.begin(trainer.options.epochs)
        adam = Adam(trainer.groups())
        leaves = [leaf for group, _ in trainer.groups() for leaf in group]

        def step(trainer: Trainer = trainer, adam: Adam = adam, leaves: list[torch.Tensor] = leaves) -> None:
            for leaf in leaves:
                leaf.grad = None
            trainer.loss(everything).backward()
            adam.step(1.0)
            with torch.no_grad():
                trainer.project()

        times: dict[str, list[float]] = {"plain": [], "fit": []}
        for _ in range(options.rounds + 1):
            times["plain"].append(seconds(plain, options.device))
            times["fit"].append(seconds(step, options.device))
        # The first of each warms up.
        medians = {side: statistics.median(values[1:]) for side, values in times.items()}
        rows.append({"case": name, **medians, "ratio": medians["fit"] / medians["plain"]})
    print(f"SmolLM2 block 0, {options.tokens} tokens a step, {options.device}, {torch.get_num_threads()} threads")
    print(f"{'':32} {'plain s':>8} {'fit s':>8} {'ratio':>6} {'tokens/s':>9}")
    for row in rows:
        print(
            f"{row['case']:32} {row['plain']:>8.3f} {row['fit']:>8.3f} {row['ratio']:>6.2f} "
            f"{options.tokens / row['fit']:>9.0f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    worst = max(rows, key=lambda row: row["ratio"] if "double" not in row["case"] else 0.0)
    if worst["ratio"] > ALLOWED:
        raise SystemExit(f"{worst['case']}: {worst['ratio']:.2f} times a plain step; {ALLOWED:g} is allowed")


if __name__ == "__main__":
    main()
