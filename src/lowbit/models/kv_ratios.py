"""The clipping ratios of queries, keys and values in a layer: a parameter of it, which its attention function reads.

A scheme with rotated heads has them; ``methods/kv_clips.py`` searches them. In a block and in a shard they are a
parameter ``RATIOS`` of the layer, ``(3,)`` in the order of ``KINDS``; while the layer runs, an attribute or buffer
``ATTRIBUTE`` of its attention module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError

KINDS = ("query", "key", "value")
RATIOS = "lowbit_kv.ratios"
ATTRIBUTE = "lowbit_kv_ratios"


@contextmanager
def ratios_at(attention: nn.Module, ratios: Tensor | None) -> Iterator[None]:
    """Within the context, an attention module has these ratios; ``None``: it has none."""
    if ratios is None:
        yield
        return
    setattr(attention, ATTRIBUTE, ratios)
    try:
        yield
    finally:
        delattr(attention, ATTRIBUTE)


def read_ratios(checkpoint: Checkpoint, layer: str) -> Tensor:
    """A layer's ratios by the path of its module, ``(3,)`` float32.

    Raises:
        LowbitError: there are none, or not three numbers above 0 and at most 1.
    """
    name = f"{layer}.{RATIOS}"
    ratios = checkpoint.read([name])[name] if name in checkpoint.names else torch.zeros(0)
    if ratios.shape != (len(KINDS),) or not bool(((ratios > 0) & (ratios <= 1)).all()):
        raise LowbitError(
            f"'{name}' in {checkpoint.folder} is not three ratios above 0 and at most 1: copy the folder again, or "
            "quantize again"
        )
    return ratios.float()
