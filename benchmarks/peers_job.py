"""What a driver of another tool is given and gives back; runs in that tool's environment, without ``lowbit``.

A job is a JSON file that names a float model's folder, a file of token ids and a folder for the result. The result
is ``model.safetensors``: every parameter of the quantized model, as the float32 values that codes stand for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

TOLERANCE = 0.02  # of the largest code: bfloat16 rounds products to 8 bits, so that they are off by 1/256 at most


@dataclass(frozen=True)
class Job:
    """One quantization.

    Attributes:
        method: of the tool.
        model: folder of the float model.
        tokens: file with ``ids``, ``(sequences, length)`` int64.
        out: folder for the result.
        bits, group, symmetric: weights of all linears but the head.
        seed: of the tool's own random numbers.
        steps: of methods that learn; others ignore it.
    """

    method: str
    model: str
    tokens: str
    out: str
    bits: int
    group: int
    symmetric: bool
    seed: int
    steps: int

    def ids(self) -> Tensor:
        """Token ids ``(sequences, length)``."""
        return load_file(self.tokens)["ids"]

    def float_model(self) -> Any:
        """The float model in float32."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

    def write(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        """Save a quantized model.

        Args:
            model: has the parameters of the float model by their names, and may have others.
            weights: of the quantized modules, by their names, ``(out, in)``; they replace those of ``model``.
        """
        # A head that is tied to the embedding comes once.
        names = [name for name, _ in self.float_model().named_parameters()]
        replaced = {f"{name}.weight": value for name, value in weights.items()}
        if unknown := replaced.keys() - set(names):
            raise SystemExit(f"the float model has no {', '.join(sorted(unknown))}")
        values: dict[str, Tensor] = {**dict(model.named_parameters()), **replaced}
        tensors = {name: values[name].detach().float().contiguous() for name in names}
        save_file(tensors, str(Path(self.out) / "model.safetensors"), {"format": "pt"})


def values_of_codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int) -> Tensor:
    """``(code - zero) * scale`` in float32, with codes recovered from a weight that is kept in 16 bits.

    With scale 0.1 and zero point 8, a weight of 0.2998 is 3 steps above zero, code 11: 0.3.

    Args:
        weight: ``(out, in)``, the same product in bfloat16 or a wider type.
        scale: ``(out, groups)``.
        zero: the code of 0, ``(out, groups)`` or one for all.
        bits: of codes, which are at least 0.
        group: columns with one scale.
    """
    scale = scale.float().unsqueeze(-1)
    zero = zero.float().unsqueeze(-1)
    position = weight.float().view(len(weight), -1, group) / scale
    steps = position.round()
    if bool((position - steps).abs().max() > TOLERANCE * 2**bits):
        raise SystemExit("a weight is not a multiple of its scale: this version of the tool stores another formula")
    codes = steps + zero
    if bool(codes.min() < 0) or bool(codes.max() > 2**bits - 1):
        raise SystemExit(f"codes from {codes.min():.0f} to {codes.max():.0f} do not fit {bits} bits")
    return (steps * scale).view_as(weight)


def job() -> Job:
    """The job that the command line names."""
    torch.set_num_threads(1)
    return Job(**json.loads(Path(sys.argv[1]).read_text()))
