"""A model read from disk block by block: what evaluation needs, at the memory of one block.

It takes a float checkpoint or a finished run folder. For a run folder the blocks are those that ship: codes read
back from the shards, inputs of linears and Q, K, V rounded as the scheme says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.block import Block, run_all
from lowbit.checkpoint import Checkpoint, block_params
from lowbit.checks import building, check_tensors, check_tied, refuse_foreign_quantization, shapes_of
from lowbit.errors import LowbitError
from lowbit.progress import track
from lowbit.quant import QuantSpec
from lowbit.runfolder import dequantized, manifest_of, manifest_specs, read_block
from lowbit.scheme import Scheme
from lowbit.skeleton import Skeleton
from lowbit.source import load_config

# Hidden states of this many bytes are held at once; longer texts are done in several passes over the blocks.
HELD_BYTES = 1 << 30


class StreamedModel:
    """A causal language model on disk.

    Attributes:
        config: its Hugging Face config.
        scheme: the run's scheme; ``None`` for a float checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        """Open ``folder``; embeddings and head are read now, blocks when they are needed."""
        manifest = manifest_of(folder)
        self.config: Any = load_config(folder, trust_remote_code)
        refuse_foreign_quantization(self.config, manifest, folder)
        self.device, self.dtype = device, dtype
        self.scheme: Scheme | None = None
        self._specs: dict[str, QuantSpec] = {}
        self._layout = ""
        if manifest is not None:
            self.scheme, self._specs, self._layout = manifest_specs(manifest)
        self.checkpoint = Checkpoint(folder)
        with building(folder):
            self.skeleton = Skeleton(self.config, trust_remote_code)
        check_tensors(self.checkpoint, shapes_of(self.skeleton), self.skeleton.family.blocks, self._specs)
        check_tied(self.checkpoint, self.skeleton)
        rest = dequantized(self.checkpoint, self.skeleton.rest_names, self._specs, self._layout)
        self.skeleton.fill({name: value.to(device, dtype) for name, value in rest.items()})
        self.skeleton.model.to(device)
        if self.scheme and self.scheme.act and self.skeleton.family.head in self._specs:
            self.skeleton.round_head_input(self.scheme.act)

    def block(self, index: int) -> Block:
        """Layer ``index``, read now."""
        if self.scheme is not None:
            return read_block(self.checkpoint, self.skeleton, index, self._specs, self._layout, self.device)
        params = block_params(self.checkpoint, self.skeleton.family.blocks, index, self.skeleton.layers[index])
        return self.skeleton.block(index, {name: value.to(self.device) for name, value in params.items()})

    @torch.no_grad()
    def logits(self, ids: Tensor, batch: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
        """``(ids, logits)`` in batches, ``(b, length)`` and ``(b, length, vocabulary)``, in the given order.

        ``ids`` is ``(sequences, length)``, unpadded. Every block is read once for each gigabyte of hidden states.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit and ids.shape[1] > limit:
            raise LowbitError(
                f"length {ids.shape[1]} given; this model's positions end at {limit}: use --length {limit}"
            )
        width = self.config.hidden_size * ids.shape[1] * self.dtype.itemsize
        held = max(1, HELD_BYTES // width)
        for part in ids.to(self.device).split(held):
            x = self.skeleton.start(part)
            for index in track(range(len(self.skeleton.layers)), "blocks"):
                block = self.block(index)
                x = run_all(block, x, block.quantized_params(), self.scheme, batch=batch)
            for some, hidden in zip(part.split(batch), x.split(batch), strict=True):
                yield some, self.skeleton.logits(some, hidden)
