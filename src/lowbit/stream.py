"""A model read from disk block by block: what evaluation needs, at the memory of one block.

It takes a float checkpoint or a finished run folder. For a run folder the blocks are those that ship: codes read
back from the shards, inputs of linears and Q, K, V rounded as the scheme says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lowbit.block import Block, run_all
from lowbit.checkpoint import Checkpoint, block_params
from lowbit.errors import LowbitError
from lowbit.progress import track
from lowbit.quant import QuantSpec
from lowbit.runfolder import dequantized, manifest_of, manifest_specs, read_block
from lowbit.scheme import Scheme
from lowbit.skeleton import Skeleton
from lowbit.source import load_config

# Hidden states of this many bytes are held at once; longer texts are done in several passes over the blocks.
HELD_BYTES = 1 << 30
FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them


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


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Around what transformers makes of ``config.json``: its values are checked nowhere before, and by any error."""
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise LowbitError(
            f"no model can be built from {folder / 'config.json'} ({reason}): fetch it again"
        ) from error


def shapes_of(skeleton: Skeleton) -> dict[str, torch.Size]:
    """Shapes of all tensors that a float checkpoint of the model has, by the model's names."""
    state, blocks = skeleton.model.state_dict(), skeleton.family.blocks
    shapes = {name: state[name].shape for name in skeleton.rest_names}
    for index, layer in enumerate(skeleton.layers):
        shapes |= {f"{blocks}.{index}.{name}": value.shape for name, value in layer.named_parameters()}
    return shapes


def check_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], blocks: str, specs: Mapping[str, QuantSpec]
) -> None:
    """Refuse a checkpoint that does not hold what its config implies; headers are read, no tensor.

    ``shapes`` are those of the float model; modules in ``specs`` are rounded and not looked at. A weight of a block
    that the model has no place for would be left out silently, so it is refused (rotary buffers may stay).
    """
    stored: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in checkpoint.files:
        with safe_open(file, framework="pt") as shard:
            headers = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            stored |= {name: (tuple(head.get_shape()), head.get_dtype()) for name, head in headers.items()}
    used = set()
    for name, shape in shapes.items():
        if name.removesuffix(".weight") in specs:
            continue
        found = checkpoint.find(name)
        if found is None:
            raise LowbitError(f"{checkpoint.folder} has no tensor '{name}': it does not fit its config.json")
        used.add(found)
        given, dtype = stored[found]
        if given != tuple(shape):
            raise LowbitError(
                f"'{found}' in {checkpoint.folder} is {given}, config.json implies {tuple(shape)}: they do not "
                "belong together"
            )
        if dtype not in FLOATS:
            raise LowbitError(f"'{found}' in {checkpoint.folder} is {dtype}; allowed: {', '.join(FLOATS)}")
    inside = (f"{blocks}.", f"{blocks.removeprefix('model.')}.")
    for name in () if specs else checkpoint.names:
        if name not in used and name.startswith(inside) and name.endswith((".weight", ".bias")):
            raise LowbitError(
                f"{checkpoint.folder} has a tensor '{name}' that config.json has no place for: they do not belong "
                "together"
            )


def check_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Read everything once: better to know of a NaN in the last block before hours of work than after."""
    for name in track(list(names), "checking weights"):
        checkpoint.read([name])


def refuse_foreign_quantization(config: Any, manifest: dict[str, Any] | None, folder: Path) -> None:
    """A checkpoint that another tool quantized is refused: its format would not be read as it should."""
    found = getattr(config, "quantization_config", None)
    if found is not None and manifest is None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise LowbitError(f"{folder} is already quantized ({method}) and has no lowbit.json: give a float checkpoint")
