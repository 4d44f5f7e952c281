"""Checks that a checkpoint matches its config, before any work and from headers where they suffice."""

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

FLOATS = ("F16", "BF16", "F32", "F64")  # safetensors' names


@contextmanager
def report_build_errors(folder: Path) -> Iterator[None]:
    """Report errors of transformers on an invalid ``config.json``, which may be of many types, as ``LowbitError``."""
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
    """Shapes of all tensors in a float checkpoint of the model, by the model's names."""
    state, blocks = skeleton.model.state_dict(), skeleton.family.blocks
    shapes = {name: state[name].shape for name in skeleton.shared_names}
    for index, layer in enumerate(skeleton.layers):
        shapes |= {f"{blocks}.{index}.{name}": value.shape for name, value in layer.named_parameters()}
    return shapes


def check_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], blocks: str, quantized: Collection[str]
) -> None:
    """Refuse a checkpoint whose tensors do not match its config; only headers are read.

    ``shapes`` are those of the float model; modules in ``quantized`` are not checked. A block weight or bias that is
    not in the model is refused, since it would be ignored silently (rotary buffers are accepted).
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
        stored_name = checkpoint.find(name)
        if stored_name is None:
            raise LowbitError(f"{checkpoint.folder} has no tensor '{name}': it does not match its config.json")
        used.add(stored_name)
        stored_shape, dtype = stored[stored_name]
        if stored_shape != tuple(shape):
            raise LowbitError(
                f"'{stored_name}' in {checkpoint.folder} has shape {stored_shape}, config.json implies "
                f"{tuple(shape)}: they do not match"
            )
        if dtype not in FLOATS:
            raise LowbitError(f"'{stored_name}' in {checkpoint.folder} is {dtype}; allowed: {', '.join(FLOATS)}")
    prefixes = (f"{blocks}.", f"{blocks.removeprefix('model.')}.")
    for name in () if quantized else checkpoint.names:
        if name not in used and name.startswith(prefixes) and name.endswith((".weight", ".bias")):
            raise LowbitError(
                f"{checkpoint.folder} has a tensor '{name}' that its config.json does not imply: they do not match"
            )


def check_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Refuse NaN and infinite values, by reading every tensor once before any work."""
    for name in track(list(names), "checking weights"):
        checkpoint.read([name])


def refuse_foreign_quantization(config: Any, ours: bool, folder: Path) -> None:
    """Refuse a checkpoint that another tool quantized: its format is not supported."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not ours:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise LowbitError(f"{folder} is already quantized ({method}) and has no lowbit.json: give a float checkpoint")


def check_tied(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """Refuse a checkpoint whose head differs from the embedding although its config ties them."""
    head, embed = (f"{name}.weight" for name in (skeleton.family.head, skeleton.family.embed))
    if not skeleton.tied or checkpoint.find(head) is None:
        return
    weights = checkpoint.read([head, embed])
    if not torch.equal(weights[head], weights[embed]):
        raise LowbitError(
            f"{checkpoint.folder} has a '{head}' that differs from '{embed}', but config.json ties them "
            "(tie_word_embeddings): set it to false there, or fetch the checkpoint again"
        )


def check_ids(ids: torch.Tensor, skeleton: Skeleton, folder: Path) -> None:
    """Refuse token ids beyond the model's embeddings."""
    rows = skeleton.model.get_input_embeddings().weight.shape[0]
    if ids.max() >= rows:
        raise LowbitError(
            f"the tokenizer in {folder} gives token {int(ids.max())}, the model has {rows} embeddings: they do not "
            "match"
        )
