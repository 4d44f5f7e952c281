"""A model read from disk block by block, for evaluation with the memory of one block.

The source is a float checkpoint or a finished run folder. The blocks of a run folder are the quantized ones: weights
dequantized from the shards, inputs of linears and Q, K, V quantized according to the scheme.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.positions import positions_of
from lowbit.checkpoints.resolve import load_config
from lowbit.checkpoints.safetensors_folder import block_params
from lowbit.errors import LowbitError
from lowbit.models.block import Block
from lowbit.models.families import architecture_of
from lowbit.models.forward import run_all
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import (
    check_computes,
    check_ids,
    check_model,
    open_weights,
    report_build_errors,
)
from lowbit.progress import track
from lowbit.quant.scheme import ModelFormats, Scheme, simulated_on
from lowbit.runs.manifest import manifest_of, require_trust
from lowbit.runs.reading import read_block, read_dequantized, run_formats, run_scheme

# Maximum bytes of hidden states held at once; longer texts take several passes over the blocks.
HELD_BYTES = 1 << 30


class StreamedModel:
    """A causal language model on disk.

    Attributes:
        folder: where it is.
        config: its Hugging Face config.
        scheme: the run's scheme; ``None`` for a float checkpoint.
        formats: formats of the model's modules; a float checkpoint has none.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        target: str | None = None,
    ) -> None:
        """Open ``folder``; shared parameters are read now, blocks on demand.

        ``target`` names a runtime whose input quantization is simulated, or ``float``; by default the run's own.
        """
        manifest = manifest_of(folder)
        self.folder = folder
        self.config: Any = load_config(folder, trust_remote_code)
        require_trust(folder, manifest, trust_remote_code)
        self.device, self.dtype = device, dtype
        self.scheme: Scheme | None = simulated_on(run_scheme(manifest) if manifest else None, target)
        self.checkpoint, _ = open_weights(folder, self.config, manifest is not None, trust_remote_code)
        self.formats = ModelFormats()
        if manifest is not None and self.scheme is not None:
            self.formats = run_formats(manifest, self.scheme, architecture_of(self.config))
        check_model(self.checkpoint, self.config, self.formats.modules, trust_remote_code)
        with report_build_errors(folder):
            self.skeleton = Skeleton(self.config, trust_remote_code)
        if manifest is not None:
            self.skeleton.behind(len(manifest.prefix_ids))
        shared = read_dequantized(self.checkpoint, self.skeleton.shared_names, self.formats.modules)
        self.skeleton.fill({name: value.to(device, dtype) for name, value in shared.items()})
        self.skeleton.model.to(device)
        if (inputs := self.formats.input(self.skeleton.architecture.head)) is not None:
            self.skeleton.quantize_head_input(inputs)
        check_computes(self.skeleton, lambda: self.block(0), folder)

    def block(self, index: int) -> Block:
        """Read layer ``index``."""
        if self.scheme is not None:
            return read_block(self.checkpoint, self.skeleton, index, self.formats, self.device)
        blocks, shapes = self.skeleton.architecture.blocks, self.skeleton.parameter_shapes(index)
        params = block_params(self.checkpoint, blocks, index, shapes)
        return self.skeleton.block(index, {name: value.to(self.device) for name, value in params.items()})

    @property
    def width(self) -> int:
        """Bytes of what one token hands from layer to layer."""
        return self.skeleton.width * self.dtype.itemsize

    @property
    def blocks(self) -> int:
        """Number of decoder layers."""
        return len(self.skeleton.layers)

    def check_length(self, length: int) -> None:
        """Refuse windows that are longer than the model's positions."""
        limit, prefix = positions_of(self.skeleton.text_config), self.skeleton.prefix
        if limit is not None and limit < length + prefix:
            room = f"{limit}" + (f", {prefix} of which the run's prefix takes" if prefix else "")
            raise LowbitError(
                f"--length is {length}; this model's positions end at {room}: give {limit - prefix} or less"
            )

    def check_ids(self, ids: Tensor) -> None:
        """Refuse token ids beyond the model's embeddings."""
        check_ids(ids, self.skeleton, self.folder)

    def enter(self, ids: Tensor) -> Tensor:
        """The input of block 0, ``(windows, length, hidden)``, for ``ids`` ``(windows, length)``."""
        return self.skeleton.embed(ids.to(self.device))

    def through(self, index: int, batches: Sequence[Tensor]) -> list[Tensor]:
        """Run batches of hidden states through block ``index``, which is read for this call only.

        Their lengths may differ; ``enter`` must have been called with each length since the last ``forget``.
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
        """Logits ``(tokens, vocabulary)`` of hidden states ``(tokens, hidden)``; norm and head act per token."""
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
        return self.skeleton.logits(ids, hidden[None])[0]

    @torch.no_grad()
    def logits(self, ids: Tensor, batch: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
        """``(ids, logits)`` in batches, ``(b, length)`` and ``(b, length, vocabulary)``, in order.

        ``ids`` is ``(sequences, length)``, unpadded. Every block is read once per gigabyte of hidden states.
        """
        for _, batch_ids, logits in self.logits_of(batches_of([ids], batch)):
            yield batch_ids, logits

    @torch.no_grad()
    def logits_of(self, batches: Sequence[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """``(index of the text, ids, logits)`` of batches ``(index of the text, ids)``, in order.

        All texts take one pass over the blocks. No batch mixes windows of two texts, so that each text's logits equal
        those of a separate pass bit for bit.
        """
        for which, ids, hidden in self.last_hidden(batches):
            yield which, ids, self.skeleton.logits(ids, hidden)

    @torch.no_grad()
    def last_hidden(
        self, batches: Sequence[tuple[int, Tensor]], title: str = "blocks"
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The last block's output ``(index of the text, ids, (windows, length, hidden))`` of each batch, in order.

        Batches may differ in length. Every block is read once per gigabyte of hidden states; ``title`` labels the
        progress bar of each such pass.
        """
        for _, ids in batches:
            self.check_length(ids.shape[1])
        groups = list(passes(batches, self.width))
        for number, group in enumerate(groups, 1):
            self.skeleton.forget()
            xs = [self.enter(ids) for _, ids in group]
            label = f"{title} {number}/{len(groups)}" if len(groups) > 1 else title
            for index in track(range(self.blocks), label):
                xs = self.through(index, xs)
            for (which, ids), hidden in zip(group, xs, strict=True):
                yield which, ids.to(self.device), hidden


def batches_of(texts: Sequence[Tensor], batch: int = 4) -> list[tuple[int, Tensor]]:
    """``(index of the text, ids)`` of at most ``batch`` windows of texts ``(windows, length)``, in order."""
    return [(which, ids) for which, text in enumerate(texts) for ids in text.split(batch)]


def passes(batches: Sequence[tuple[int, Tensor]], width: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Batches ``(index of the text, ids)``, grouped by pass over the blocks.

    A group's hidden states, ``width`` bytes per token, fit into ``HELD_BYTES``; it holds at least one batch.
    """
    group: list[tuple[int, Tensor]] = []
    held = 0
    for which, ids in batches:
        if group and held + ids.numel() * width > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append((which, ids))
        held += ids.numel() * width
    if group:
        yield group
