"""Output error and cost of ways to choose codes, on one block of SmolLM2-135M-Instruct.

    python benchmarks/rounding.py [--data builtin] [--unseen builtin] [--block 10] [--scheme w2a16g64-asym ...]
        [--only NAME ...] [--set rounding.FIELD=VALUE ...] [--json FILE]

The block reads the float model's hidden states, so that a row is about this block alone. ``error`` is that of the
block's output on sequences that no step sees, each token's relative to its float output, and ``seconds`` are of the
CPU. ``--data`` and ``--unseen`` are texts as ``lowbit quantize --data`` takes them; built-in calibration and
evaluation texts do not overlap.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.resolve import load_config, load_tokenizer, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint, block_params
from lowbit.data.text import calibration, evaluation
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run_all, run_quantized
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.recipe import Recipe, recipe_from_dict, with_settings
from lowbit.quant.scheme_names import parse_scheme

SEQUENCES, LENGTH, EPOCHS = 16, 256, 15  # 14 sequences are trained on: 210 steps
ROUNDING: dict[str, dict[str, Any]] = {
    "sign": {},
    "sigmoid": {"parametrisation": "sigmoid"},
    "gumbel": {"parametrisation": "gumbel"},
}
METHODS: dict[str, list[Any]] = {"rtn": ["rtn"], "gptq": ["gptq"], "awq+gptq": ["awq", "gptq"]}
for title, options in ROUNDING.items():
    METHODS[title] = [{"rounding": {**options, "epochs": EPOCHS}}]
    METHODS[f"gptq, {title}"] = [{"rounding": {**options, "epochs": EPOCHS, "start": "gptq"}}]
    METHODS[f"awq, {title}"] = ["awq", {"rounding": {**options, "epochs": EPOCHS}}]


def block_and_states(index: int, texts: tuple[str, str]) -> tuple[Block, Tensor, Tensor]:
    """A block of the float model and its inputs for a calibration and an unseen text."""
    folder = resolve("demo").folder
    skeleton, checkpoint, tokenizer = Skeleton(load_config(folder)), Checkpoint(folder), load_tokenizer(folder)
    skeleton.fill({name: value.float() for name, value in checkpoint.read(skeleton.shared_names).items()})
    seen = calibration(texts[0], tokenizer, SEQUENCES, LENGTH, 0).ids
    unseen = evaluation(texts[1], tokenizer, LENGTH, SEQUENCES * LENGTH).ids

    def block(at: int) -> Block:
        shapes = skeleton.parameter_shapes(at)
        return skeleton.block(at, block_params(checkpoint, skeleton.architecture.blocks, at, shapes))

    x, other = skeleton.embed(seen), skeleton.embed(unseen)
    for at in range(index):
        x, other = run_all(block(at), x), run_all(block(at), other)
    return block(index), x, other


def planned(block: Block, scheme: str) -> Block:
    """The block with a scheme's formats, as the plan of a run gives them."""
    parsed = parse_scheme(scheme)
    found = {name: parsed.module(block.full_name(name)) for name in block.linears()}
    return replace(block, formats={name: own for name, own in found.items() if own is not None}, kv=parsed.kv)


def measure(recipe: Recipe, block: Block, calib: Calib, unseen: Tensor) -> dict[str, Any]:
    """Error on unseen sequences and CPU seconds of a recipe's steps."""
    wanted, done, began = run_all(block, unseen), block, time.process_time()
    for _, step in recipe.block_steps:
        done = step(done, calib)
    seconds = time.process_time() - began
    got = run_quantized(done, unseen)
    figures = [steps["rounding"] for steps in done.record.values() if "rounding" in steps]
    return {
        "error": float(relative_loss(got, wanted, loss_unit(wanted, "token"))),
        "seconds": seconds,
        **{key: figures[0][key] for key in ("best_epoch", "changed_codes", "held_out") if figures},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways to choose codes, on one block.")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--unseen", default="builtin")
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--scheme", nargs="+", default=["w2a16g64-asym", "w3a16g64-asym"])
    parser.add_argument("--only", nargs="+", default=list(METHODS))
    parser.add_argument("--set", nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    float_block, x, unseen = block_and_states(given.block, (given.data, given.unseen))
    rows: list[dict[str, Any]] = []
    for scheme in given.scheme:
        block = planned(float_block, scheme)
        calib = Calib(x, x, run_all(block, x))
        for name in given.only:
            recipe = recipe_from_dict({"steps": METHODS[name]}, name)
            settings = [text for text in given.set if text.partition(".")[0] in dict(recipe.steps)]
            row = {"scheme": scheme, "steps": name, **measure(with_settings(recipe, settings), block, calib, unseen)}
            rows.append(row)
            print(f"{scheme:16} {name:16} {row['error']:.4f} {row['seconds']:6.1f} s", flush=True)
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
