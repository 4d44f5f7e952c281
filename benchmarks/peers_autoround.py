"""AutoRound on given tokens; ``peers.py`` starts it in AutoRound's own environment.

Options are AutoRound's defaults except for batches of one sequence, which take the least time a step, and the method
``float32``: the default, ``bfloat16`` here, is to compute in bfloat16 on CPUs that support it. A layer keeps its
quantized weight in that precision, while the files that AutoRound writes hold codes and scales. The values here are
those of the files: codes are recovered from the weight and its scale, and multiplied in float32. Embeddings and
norms, which it leaves alone, are the float model's.
"""

from __future__ import annotations

from typing import Any

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from torch import Tensor, nn
from transformers import AutoTokenizer

from peers_job import job, values_of_codes


def weight_of(module: Any, bits: int, group: int) -> Tensor:
    """The values ``(out, in)`` that a quantized linear's codes stand for, in float32."""
    weight, zero = module.weight.detach(), module.zp
    scale = module.scale.reshape(len(weight), -1)
    if isinstance(zero, Tensor) and zero.numel() > 1:
        zero = zero.reshape(len(weight), -1)
    return values_of_codes(weight, scale, torch.as_tensor(zero), bits, group)


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
        amp=given.method != "float32",
    )
    model, _ = tuner.quantize()
    found = {name: module for name, module in model.named_modules() if getattr(module, "scale", None) is not None}
    exact = given.float_model()
    linears = [name for name, module in exact.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    if sorted(found) != sorted(linears):
        raise SystemExit(f"{len(found)} modules are quantized, {len(linears)} should be")
    with torch.no_grad():
        given.write(exact, {name: weight_of(module, given.bits, given.group) for name, module in found.items()})


if __name__ == "__main__":
    main()
