"""Activation statistics of a run for the report: each channel's largest activation, and pictures of learned matrices.

Activations are recorded in the passes that a run makes anyway, at no extra pass: in the float block on the float
hidden states, and in the quantized block on the quantized ones. All statistics are in one file beside the shards, in
bfloat16: they are displayed, not used in computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.writing import write_tensors
from lowbit.methods.statistics import Statistics
from lowbit.models.block import Block

OBSERVED = "lowbit-observed.safetensors"
FLOAT, QUANTIZED, MAP = "float", "quantized", "map"  # prefixes of the names in the file


@contextmanager
def record_peaks(block: Block) -> Iterator[dict[str, Statistics]]:
    """Within the context, runs of ``block`` record each channel's largest absolute input to its linears, ``(in,)``.

    Keys are a layer's index and the linears that read the tensor: ``7.mlp.gate_proj+mlp.up_proj``; of a mixture the
    experts module, for the tokens that all its experts read. Values are
    recorded before a linear's input is quantized; otherwise a channel below half a step would read as zero. Hooks run
    in the order of registration, and those that quantize are registered later.
    """
    peaks: dict[str, Statistics] = {}

    def add_hook(key: str, linear: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            peaks[key].add(args[0])

        return linear.register_forward_pre_hook(hook)

    with ExitStack() as stack:
        for layer, kind, index in zip(block.layers, block.kinds, block.indices, strict=True):
            shown = {"+".join(group): group[0] for group in kind.groups if kind.expert_of(group[0]) is None}
            if kind.experts is not None:
                shown[kind.experts.module] = kind.experts.module
            for name, module in shown.items():
                key = f"{index}.{name}"
                peaks[key] = Statistics(("peak",))
                hook = add_hook(key, layer.get_submodule(module))
                stack.callback(hook.remove)
        yield peaks


def write_activation_stats(out: Path, stats: Mapping[str, Tensor]) -> None:
    """Write the statistics to their file in the run folder ``out``."""
    write_tensors(out / OBSERVED, {name: value.to("cpu", torch.bfloat16) for name, value in stats.items()})


def read_activation_stats(folder: Path) -> dict[str, Tensor]:
    """A run's statistics in float32, by name: ``float.7.mlp.down_proj``, ``quantized.7...``,
    ``map.7.affinequant.heads``; empty for a run without them."""
    if not (folder / OBSERVED).exists():
        return {}
    file = Checkpoint(folder, [OBSERVED])
    return file.read(file.names, torch.float32)
