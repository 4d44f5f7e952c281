"""AutoRound on given tokens; ``peers.py`` starts it in AutoRound's own environment.

Options are AutoRound's defaults except for batches of one sequence, so that it trains on the CPU as it would on a
small machine, and ``low_gpu_mem_usage``, which has no meaning there. Its default on CPUs is to compute in bfloat16.
A layer keeps its quantized weight in that precision, while the files that AutoRound writes hold codes and scales. The
values here are those of the files: codes are recovered from the weight and its scale, and multiplied in float32.
Embeddings and norms, which it leaves alone, are the float model's.
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from torch import Tensor, nn
from transformers import AutoTokenizer

from peers_job import Job, job

TOLERANCE = 0.02  # codes of a weight in bfloat16, which has 8 bits for codes of at most 4, are nearly integers


def weight_of(module: nn.Module, job: Job) -> Tensor:
    """The values ``(out, in)`` that a quantized linear's codes stand for, from its weight, scale and zero point.

    ``weight = (code - zero) * scale`` holds up to the precision of the weight. With scale 0.1 and zero point 8, a
    weight of 0.2998 is code 11: 0.3.
    """
    weight = module.weight.detach().float()
    scale = module.scale.float().reshape(len(weight), -1, 1)
    zero = module.zp
    zero = zero.float().reshape(len(weight), -1, 1) if isinstance(zero, Tensor) and zero.numel() > 1 else float(zero)
    position = weight.view(len(weight), -1, job.group) / scale
    steps = position.round()
    if (position - steps).abs().max() > TOLERANCE * 2**job.bits:
        raise SystemExit("a weight is not a multiple of its scale: this version of AutoRound stores another formula")
    codes = steps + zero
    if codes.min() < 0 or codes.max() > 2**job.bits - 1:
        raise SystemExit(f"codes from {codes.min():.0f} to {codes.max():.0f} do not fit {job.bits} bits")
    return (steps * scale).view_as(weight)


def main() -> None:
    given = job()
    ids = given.ids()
    tuner = AutoRound(
        given.float_model(),
        AutoTokenizer.from_pretrained(given.model),
        scheme={"bits": given.bits, "group_size": given.group, "sym": given.symmetric, "data_type": "int"},
        alg_configs=SignRoundConfig(iters=given.steps),
        dataset=list(ids.split(1)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=1,
        seed=given.seed,
        device_map="cpu",
    )
    model, _ = tuner.quantize()
    found = {name: module for name, module in model.named_modules() if getattr(module, "scale", None) is not None}
    exact = given.float_model()
    linears = [name for name, module in exact.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    if sorted(found) != sorted(linears):
        raise SystemExit(f"{len(found)} modules are quantized, {len(linears)} should be")
    with torch.no_grad():
        given.write(exact, {name: weight_of(module, given) for name, module in found.items()})


if __name__ == "__main__":
    main()
