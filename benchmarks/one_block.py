"""The output error of one block of SmolLM2-135M-Instruct on unseen sequences, by rounding methods.

    python benchmarks/one_block.py [--block 10] [--scheme w3a16g64-asym] [--sequences 16] [--length 256]

The blocks before it are quantized with GPTQ, so that its input carries the error that it would in a run. Methods see
the calibration sequences, errors are of as many others of the same text: the squared error of each token relative to
its mean square in the float model, in the mean (``token``), and relative to all tokens' (``all``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from lowbit.checkpoints.resolve import load_config, load_tokenizer, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint, block_params
from lowbit.data.text import calibration
from lowbit.methods.gptq import GPTQ
from lowbit.methods.method import Method
from lowbit.methods.qronos import Qronos
from lowbit.methods.refit import Refit
from lowbit.methods.rtn import RTN
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import relative_error, run_all, run_quantized
from lowbit.models.skeleton import Skeleton
from lowbit.quant.scheme_names import parse_scheme

ROWS: Mapping[str, tuple[Method, ...]] = {
    "rtn": (RTN(),),
    "gptq": (GPTQ(),),
    "gptq, target output": (GPTQ(target="output"),),
    "refit, gptq": (Refit(), GPTQ()),
    "qronos": (Qronos(),),
    "qronos, ridge 0.01": (Qronos(ridge=0.01),),
    "qronos, ridge 0.1": (Qronos(ridge=0.1),),
}


def reached(at: int, scheme: str, sequences: int, length: int) -> tuple[Block, Calib]:
    """Block ``at`` with its formats, and its hidden states behind blocks quantized with GPTQ.

    The first half of the sequences is what methods may see.
    """
    folder = resolve("demo").folder
    skeleton, checkpoint = Skeleton(load_config(folder)), Checkpoint(folder)
    skeleton.fill({n: value.float() for n, value in checkpoint.read(skeleton.shared_names).items()})
    x_fp = x_q = skeleton.embed(calibration("builtin", load_tokenizer(folder), 2 * sequences, length, 0).ids)
    parsed = parse_scheme(scheme)
    for index in range(at + 1):
        params = block_params(checkpoint, skeleton.architecture.blocks, index, skeleton.parameter_shapes(index))
        block = skeleton.block(index, params)
        found = {name: parsed.module(block.full_name(name)) for name in block.linears()}
        block = replace(block, formats={name: own for name, own in found.items() if own is not None}, kv=parsed.kv)
        y_fp = run_all(block, x_fp)
        if index == at:
            return block, Calib(x_fp, x_q, y_fp)
        done = GPTQ()(block, seen(Calib(x_fp, x_q, y_fp)))
        x_fp, x_q = y_fp, run_quantized(done, x_q)
    raise ValueError(at)


def seen(calib: Calib) -> Calib:
    """The first half of the sequences."""
    half = len(calib.x_q) // 2
    return replace(calib, x_fp=calib.x_fp[:half], x_q=calib.x_q[:half], y_fp=calib.y_fp[:half])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--scheme", default="w3a16g64-asym")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    block, calib = reached(options.block, options.scheme, options.sequences, options.length)
    own = seen(calib)
    others = slice(len(own.x_q), None)
    wanted = calib.y_fp[others]
    before = relative_error(calib.x_q[others], calib.x_fp[others])
    print(f"block {options.block}, {options.scheme}; its input is off by {before:.5f}")
    print("| steps | token, calibration | token, unseen | all, unseen | s |\n|---|---:|---:|---:|---:|")
    for name, steps in ROWS.items():
        began, done = time.process_time(), block
        for step in steps:
            done = step(done, own)
        spent = time.process_time() - began
        errors = []
        for part in (slice(0, len(own.x_q)), others):
            output, target = run_quantized(done, calib.x_q[part]), calib.y_fp[part]
            errors.append(float(relative_loss(output, target, loss_unit(target, "token"))))
        whole = relative_error(run_quantized(done, calib.x_q[others]), wanted)
        print(f"| {name} | {errors[0]:.5f} | {errors[1]:.5f} | {whole:.6f} | {spent:.1f} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
