"""Experts that a checkpoint stores all in one tensor, found by the names that blocks have for each expert's own.

Most checkpoints have a linear for each expert. Others, gpt-oss among them, hold the library's parameters of three
dimensions; an expert's matrix is then a part of one of these.
"""

from __future__ import annotations

from collections.abc import Iterable

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.stored import StoredPart
from lowbit.models.architecture import Architecture
from lowbit.models.experts import stored_in


def settle_experts(checkpoint: Checkpoint, architecture: Architecture, names: Iterable[str]) -> None:
    """From now on ``checkpoint`` finds experts' tensors by the ``names`` of blocks, also where they are parts."""
    missing = [name for name in names if checkpoint.find(name) is None]
    for index, kind in enumerate(architecture.layers):
        prefix = f"{architecture.blocks}.{index}."
        if kind.experts is None:
            continue
        for name in missing:
            if name.startswith(prefix) and (found := stored_in(kind.experts, name.removeprefix(prefix))) is not None:
                parameter, number, linear = found
                if (stored := checkpoint.find(f"{prefix}{parameter}")) is not None:
                    part = StoredPart(stored, number, linear.rows, kind.experts.transposed)
                    checkpoint.let_part_stand_in(part, name)
