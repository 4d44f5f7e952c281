"""Tensors of the source that a run does not quantize or compute with: they come along byte for byte.

There are two kinds: those of a model's other parts, such as a vision encoder, and those that the model's class does
not list, such as heads that predict several tokens. Both keep their names, dtypes and bytes, in a file of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoints.copy_tensors import copy_tensors
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.models.architecture import Architecture
from lowbit.sources.checkpoint import QuantizedCheckpoint

CARRIED = "model-carried.safetensors"
_SHOWN = 3


@dataclass(frozen=True)
class Carried:
    """What comes along.

    Attributes:
        files: the shard of each tensor by its name there.
        notes: what they are, a sentence for each kind.
        size_bytes: their size.
    """

    files: dict[str, str]
    notes: tuple[str, ...] = ()
    size_bytes: int = 0


def carried(
    checkpoint: Checkpoint, architecture: Architecture, listed: Iterable[str], unlisted: Iterable[str]
) -> Carried:
    """What a run carries over.

    Args:
        checkpoint: the source.
        architecture: the model's.
        listed: names of the tensors of the model's class.
        unlisted: names of the source's other tensors; see ``models.validate.check_model``.

    Raises:
        LowbitError: a tensor of another part is quantized, which the run folder's config could not say.
    """
    outside = [
        *dict.fromkeys(n for name in listed if architecture.is_outside(name) for n in checkpoint.holders(name))
    ]
    for name in outside:
        if isinstance(checkpoint, QuantizedCheckpoint) and name in checkpoint.quantized:
            raise LowbitError(
                f"'{name}' in {checkpoint.folder} is quantized and not of the text model: give the float model"
            )
    shards, other = checkpoint.stored_names, sorted(set(unlisted) - _of_formats(checkpoint, architecture, unlisted))
    names = [stored for name in (*outside, *other) for stored in checkpoint.names_in_files(name)]
    parts = sorted({_part(name, architecture) for name in outside})
    notes = []
    if outside:
        notes.append(f"{len(outside)} tensors of {', '.join(parts)} are the source's, byte for byte")
    if other:
        more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        notes.append(
            f"{len(other)} tensors that the model's class does not have are the source's, byte for byte: "
            f"{', '.join(other[:_SHOWN])}{more}"
        )
    return Carried({name: shards[name] for name in names}, tuple(notes), _bytes(checkpoint, {*names}))


def _of_formats(checkpoint: Checkpoint, architecture: Architecture, unlisted: Iterable[str]) -> set[str]:
    """Tensors that belong to how the source is quantized, as ranges of inputs do; a run has formats of its own."""
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return set()
    layers = tuple(f"{architecture.blocks}.{index}." for index in range(len(architecture.layers)))
    dropped = {*checkpoint.layout.dropped_tensors}
    return {name for name in unlisted if name.startswith(layers) or name.rpartition(".")[2] in dropped}


def _part(name: str, architecture: Architecture) -> str:
    """The part of a model that a tensor is of: the first module on its path that is not on the text model's."""
    path, inner = name.split("."), architecture.text_model.split(".")
    depth = next((i for i, (a, b) in enumerate(zip(path, inner, strict=False)) if a != b), len(inner))
    return ".".join(path[: depth + 1])


def _bytes(checkpoint: Checkpoint, names: set[str]) -> int:
    bits = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}
    stored = {checkpoint.name_in_file(name): header for name, header in checkpoint.headers().items()}
    found = (stored[name] for name in names if name in stored)
    return sum(_count(header.shape) * bits.get(header.dtype, 8) // 8 for header in found)


def _count(shape: Iterable[int]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out


def write_carried(checkpoint: Checkpoint, carried: Carried, out: Path) -> None:
    """Write the file of what comes along into a run folder, unless it is there or there is nothing."""
    if carried.files and not (out / CARRIED).exists():
        copy_tensors(checkpoint.folder, carried.files, out / CARRIED)
