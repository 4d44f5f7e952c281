"""The keys and values of a prefix as files hold them: by the run in progress, and in each layer's shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.finite import is_finite
from lowbit.models.prefix import KEYS, VALUES, Prefix


def read_prefix(file: Path, ids: Sequence[int], layers: int) -> Prefix:
    """The prefix that ``settle_prefix`` wrote, named as in a block."""
    return _read(Checkpoint(file.parent, [file.name]), ids, layers, str)


def stored_prefix(checkpoint: Checkpoint, blocks: str, ids: Sequence[int], layers: int) -> Prefix:
    """The prefix of a finished run, in the coordinates of its layers.

    Args:
        checkpoint: the run folder's.
        blocks: module path of the model's list of layers.
        ids: the prefix's tokens, as the manifest has them.
        layers: number of layers.
    """
    return _read(checkpoint, ids, layers, lambda index: f"{blocks}.{index}")


def layer_prefix(checkpoint: Checkpoint, layer: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, by the path of its module: ``(heads, tokens, width)`` float32 each."""
    names = f"{layer}.{KEYS}", f"{layer}.{VALUES}"
    if missing := [name for name in names if name not in checkpoint.names]:
        raise LowbitError(f"{checkpoint.folder} lacks '{missing[0]}' of its prefix: copy the folder again")
    stored = checkpoint.read(list(names))
    for name, value in stored.items():
        fits = value.ndim == 3 and value.shape[1] == tokens and value.dtype == torch.float32
        if not fits or not is_finite(value):
            raise LowbitError(
                f"'{name}' in {checkpoint.folder} is not the float32 keys or values of {tokens} tokens: copy the "
                "folder again, or quantize again"
            )
    return stored[names[0]], stored[names[1]]


def _read(checkpoint: Checkpoint, ids: Sequence[int], layers: int, path: Callable[[int], str]) -> Prefix:
    pairs = [layer_prefix(checkpoint, path(index), len(ids)) for index in range(layers)]
    return Prefix(tuple(ids), tuple(key for key, _ in pairs), tuple(value for _, value in pairs))
