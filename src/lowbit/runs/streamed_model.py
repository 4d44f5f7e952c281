"""A model read from disk block by block: what evaluation needs, at the memory of one block.

It takes a float checkpoint or a finished run folder. For a run folder the blocks are those that ship: codes read
back from the shards, inputs of linears and Q, K, V rounded as the scheme says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.resolve import load_config
from lowbit.checkpoints.safetensors_folder import Checkpoint, block_params
from lowbit.errors import LowbitError
from lowbit.models.block import Block
from lowbit.models.forward import run_all
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import (
    check_tensors,
    check_tied,
    refuse_foreign_quantization,
    report_build_errors,
    shapes_of,
)
from lowbit.progress import track
from lowbit.quant.scheme import ModelFormats, Scheme, simulated_on
from lowbit.runs.folder import read_block, read_dequantized, run_formats, run_layout, run_scheme
from lowbit.runs.manifest import manifest_of

# Hidden states of this many bytes are held at once; longer texts are done in several passes over the blocks.
HELD_BYTES = 1 << 30


class StreamedModel:
    """A causal language model on disk.

    Attributes:
        config: its Hugging Face config.
        scheme: the run's scheme; ``None`` for a float checkpoint.
        formats: what it means for the model's modules; of a float checkpoint none is quantized.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        target: str | None = None,
    ) -> None:
        """Open ``folder``; embeddings and head are read now, blocks when they are needed.

        ``target`` names a runtime whose inputs are simulated, or ``float``; by default the one the run was made for.
        """
        manifest = manifest_of(folder)
        self.config: Any = load_config(folder, trust_remote_code)
        refuse_foreign_quantization(self.config, manifest is not None, folder)
        self.device, self.dtype = device, dtype
        self.scheme: Scheme | None = simulated_on(run_scheme(manifest) if manifest else None, target)
        self.checkpoint = Checkpoint(folder)
        with report_build_errors(folder):
            self.skeleton = Skeleton(self.config, trust_remote_code)
        family = self.skeleton.family
        self.formats, self._layout = ModelFormats(), ""
        if manifest is not None and self.scheme is not None:
            self.formats = run_formats(manifest, self.scheme, family.embed)
            self._layout = run_layout(manifest, family.embed)
        weights = self.formats.weights
        check_tensors(self.checkpoint, shapes_of(self.skeleton), family.blocks, weights)
        check_tied(self.checkpoint, self.skeleton)
        rest = read_dequantized(self.checkpoint, self.skeleton.shared_names, weights, self._layout)
        self.skeleton.fill({name: value.to(device, dtype) for name, value in rest.items()})
        self.skeleton.model.to(device)
        if (inputs := self.formats.input(family.head)) is not None:
            self.skeleton.quantize_head_input(inputs)

    def block(self, index: int) -> Block:
        """Layer ``index``, read now."""
        if self.scheme is not None:
            return read_block(self.checkpoint, self.skeleton, index, self.formats, self._layout, self.device)
        params = block_params(self.checkpoint, self.skeleton.family.blocks, index, self.skeleton.layers[index])
        return self.skeleton.block(index, {name: value.to(self.device) for name, value in params.items()})

    @property
    def width(self) -> int:
        """Bytes of one token's hidden state."""
        return int(self.config.hidden_size) * self.dtype.itemsize

    @property
    def blocks(self) -> int:
        """How many decoder layers there are."""
        return len(self.skeleton.layers)

    def check_length(self, length: int) -> None:
        """Refuse windows that are longer than the model's positions."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit and length > limit:
            raise LowbitError(f"length {length} given; this model's positions end at {limit}: use --length {limit}")

    def enter(self, ids: Tensor) -> Tensor:
        """What block 0 is called with for ``ids`` ``(windows, length)``: ``(windows, length, hidden)``."""
        return self.skeleton.embed(ids.to(self.device))

    def through(self, index: int, batches: Sequence[Tensor]) -> list[Tensor]:
        """Batches of hidden states through block ``index``, which is read now and held no longer.

        Their lengths may differ; ``enter`` has seen each of them since the last ``forget``.
        """
        block = self.block(index)
        params, quantized = block.quantized_params(), self.scheme is not None
        return [
            run_all(self.skeleton.for_length(block, x.shape[1]), x, params, quantized=quantized, batch=len(x))
            for x in batches
        ]

    def scores(self, ids: Tensor, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Logits ``(windows, stop - start, vocabulary)`` at positions ``start`` to ``stop`` of the windows."""
        keep = torch.arange(start, stop, device=self.device)
        return self.skeleton.logits(ids.to(self.device), hidden, keep)

    def token_scores(self, hidden: Tensor) -> Tensor:
        """Logits ``(tokens, vocabulary)`` of tokens ``(tokens, hidden)`` from anywhere: norm and head mix none."""
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
        return self.skeleton.logits(ids, hidden[None])[0]

    @torch.no_grad()
    def logits(self, ids: Tensor, batch: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
        """``(ids, logits)`` in batches, ``(b, length)`` and ``(b, length, vocabulary)``, in the given order.

        ``ids`` is ``(sequences, length)``, unpadded. Every block is read once for each gigabyte of hidden states.
        """
        for _, some, found in self.logits_of([ids], batch):
            yield some, found

    @torch.no_grad()
    def logits_of(self, texts: Sequence[Tensor], batch: int = 4) -> Iterator[tuple[int, Tensor, Tensor]]:
        """``logits`` of several texts in one pass over the blocks: ``(which text, ids, logits)``, texts in order.

        No batch holds windows of two texts, so that each comes out with the very bits that it has alone.
        """
        for which, ids, hidden in self.last_hidden(texts, batch):
            yield which, ids, self.skeleton.logits(ids, hidden)

    @torch.no_grad()
    def last_hidden(
        self, texts: Sequence[Tensor], batch: int = 4, title: str = "blocks"
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The last block's output ``(which text, ids, (windows, length, hidden))``, in batches of one text each.

        Texts may differ in length. Every block is read once for each gigabyte of hidden states; ``title`` stands
        beside the bar of each such pass.
        """
        for text in texts:
            self.check_length(text.shape[1])
        groups = list(passes(texts, self.width, batch))
        for number, some in enumerate(groups, 1):
            self.skeleton.forget()
            xs = [self.enter(ids) for _, ids in some]
            part = f"{title} {number}/{len(groups)}" if len(groups) > 1 else title
            for index in track(range(self.blocks), part):
                xs = self.through(index, xs)
            for (which, ids), hidden in zip(some, xs, strict=True):
                yield which, ids.to(self.device), hidden


def passes(texts: Sequence[Tensor], width: int, batch: int = 4) -> Iterator[list[tuple[int, Tensor]]]:
    """Batches ``(which text, ids)`` of ``batch`` windows at most, in groups that go over the blocks together.

    A group's hidden states, ``width`` bytes a token, fit into ``HELD_BYTES``; it holds one batch at least.
    """
    group: list[tuple[int, Tensor]] = []
    held = 0
    for which, text in enumerate(texts):
        for ids in text.split(batch):
            if group and held + ids.numel() * width > HELD_BYTES:
                yield group
                group, held = [], 0
            group.append((which, ids))
            held += ids.numel() * width
    if group:
        yield group
