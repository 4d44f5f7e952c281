"""Does a checkpoint hold what its config implies? Asked before any work, from headers where that is enough."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.models.skeleton import Skeleton
from lowbit.progress import track

FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them


@contextmanager
def report_build_errors(folder: Path) -> Iterator[None]:
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
    shapes = {name: state[name].shape for name in skeleton.shared_names}
    for index, layer in enumerate(skeleton.layers):
        shapes |= {f"{blocks}.{index}.{name}": value.shape for name, value in layer.named_parameters()}
    return shapes


def check_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], blocks: str, quantized: Collection[str]
) -> None:
    """Refuse a checkpoint that does not hold what its config implies; headers are read, no tensor.

    ``shapes`` are those of the float model; modules in ``quantized`` are not looked at. A weight of a block
    that the model has no place for would be left out silently, so it is refused (rotary buffers may stay).
    """
    stored: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in checkpoint.files:
        with safe_open(file, framework="pt") as shard:
            headers = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            stored |= {name: (tuple(head.get_shape()), head.get_dtype()) for name, head in headers.items()}
    used = set()
    for name, shape in shapes.items():
        if name.removesuffix(".weight") in quantized:
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
    for name in () if quantized else checkpoint.names:
        if name not in used and name.startswith(inside) and name.endswith((".weight", ".bias")):
            raise LowbitError(
                f"{checkpoint.folder} has a tensor '{name}' that config.json has no place for: they do not belong "
                "together"
            )


def check_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Read everything once: better to know of a NaN in the last block before hours of work than after."""
    for name in track(list(names), "checking weights"):
        checkpoint.read([name])


def refuse_foreign_quantization(config: Any, ours: bool, folder: Path) -> None:
    """A checkpoint that another tool quantized is refused: its format would not be read as it should."""
    found = getattr(config, "quantization_config", None)
    if found is not None and not ours:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise LowbitError(f"{folder} is already quantized ({method}) and has no lowbit.json: give a float checkpoint")


def check_tied(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """Refuse a file with a head of its own under a config that says head and embedding are one tensor."""
    head, embed = (f"{name}.weight" for name in (skeleton.family.head, skeleton.family.embed))
    if not skeleton.tied or checkpoint.find(head) is None:
        return
    both = checkpoint.read([head, embed])
    if not torch.equal(both[head], both[embed]):
        raise LowbitError(
            f"{checkpoint.folder} holds a '{head}' that differs from '{embed}', and config.json says that they are "
            "one (tie_word_embeddings): set it to false there, or fetch the checkpoint again"
        )


def check_ids(ids: torch.Tensor, skeleton: Skeleton, folder: Path) -> None:
    """Refuse tokens that the model has no embedding for."""
    rows = skeleton.model.get_input_embeddings().weight.shape[0]
    if ids.max() >= rows:
        raise LowbitError(
            f"the tokenizer in {folder} gives token {int(ids.max())}, the model has {rows} embeddings: they do not "
            "belong together"
        )
