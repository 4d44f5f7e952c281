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
        own = dict(model.named_parameters())
        # A head that is tied to the embedding comes once.
        names = [name for name, _ in self.float_model().named_parameters()]
        replaced = {f"{name}.weight": value for name, value in weights.items()}
        if unknown := replaced.keys() - set(names):
            raise SystemExit(f"the float model has no {', '.join(sorted(unknown))}")
        tensors = {name: replaced.get(name, own[name]).detach().float().contiguous() for name in names}
        save_file(tensors, str(Path(self.out) / "model.safetensors"), {"format": "pt"})


def job() -> Job:
    """The job that the command line names."""
    torch.set_num_threads(1)
    return Job(**json.loads(Path(sys.argv[1]).read_text()))
