"""What a run saw on its way, for the report: each channel's largest activation, and pictures of learned matrices.

Activations are watched in the passes that a run makes anyway, so that looking costs nothing: in the float block on
the float stream, and in the block as it ships on the quantized one. All goes into one file beside the shards, in
bfloat16: it is looked at, never computed with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoints.safetensors_folder import Checkpoint, write_tensors
from lowbit.methods.statistics import Statistics
from lowbit.models.block import Block

OBSERVED = "lowbit-observed.safetensors"
FLOAT, QUANTIZED, MAP = "float", "quantized", "map"  # first words of the names in the file


@contextmanager
def record_peaks(block: Block) -> Iterator[dict[str, Statistics]]:
    """Within it, runs of ``block`` note the largest absolute value of each channel ``(in,)`` that linears read.

    Keys are a layer's index and the linears that read the tensor: ``7.mlp.gate_proj+mlp.up_proj``. Values are taken
    before a linear's input is rounded, else a channel below half a step would look as if it were not there: hooks run
    in the order in which they were registered, and those that round come later.
    """
    seen: dict[str, Statistics] = {}

    def watch(key: str, linear: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[key].add(args[0])

        return linear.register_forward_pre_hook(hook)

    with ExitStack() as stack:
        for layer, index in zip(block.layers, block.indices, strict=True):
            for group in block.family.linears:
                key = f"{index}.{'+'.join(group)}"
                seen[key] = Statistics(("peak",))
                hook = watch(key, layer.get_submodule(group[0]))
                stack.callback(hook.remove)
        yield seen


def write_activation_stats(out: Path, found: Mapping[str, Tensor]) -> None:
    """Write everything that was seen to its file in the run folder ``out``."""
    write_tensors(out / OBSERVED, {name: value.to("cpu", torch.bfloat16) for name, value in found.items()})


def read_activation_stats(folder: Path) -> dict[str, Tensor]:
    """What a run saw, in float32, by ``float.7.mlp.down_proj``, ``quantized.7...`` and ``map.7.affinequant.heads``;
    empty for a run of a version that did not look."""
    if not (folder / OBSERVED).exists():
        return {}
    file = Checkpoint(folder, [OBSERVED])
    return file.read(file.names, torch.float32)
