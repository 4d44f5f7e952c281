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
from lowbit.models.families import family_of
from lowbit.models.skeleton import Skeleton
from lowbit.progress import say, track

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
        ImportError,  # of a package that the model's own code needs
        LookupError,
        NameError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        advice = "install what its code needs" if isinstance(error, ImportError) else "fetch it again"
        raise LowbitError(f"no model can be built from {folder / 'config.json'} ({reason}): {advice}") from error


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
    """Refuse a checkpoint that is quantized and not a run folder: an export of a run, or another tool's."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not ours:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise LowbitError(
            f"{folder} is already quantized ({method}) and has no lowbit.json, so it is an export or another tool's: "
            f"give a float model or a run folder; 'lowbit verify RUN {folder}' compares an export with its run"
        )


def settle_tied(checkpoint: Checkpoint, config: Any) -> None:
    """Make config and checkpoint agree on whether head and embedding are one tensor, as ``transformers`` loads them.

    Where the config ties them, either may be stored, and both if they are equal. If both are stored and differ, they
    are not tied: the config is changed, which is said.
    """
    family = family_of(config)
    head, embed = f"{family.head}.weight", f"{family.embed}.weight"
    if not config.tie_word_embeddings or (stored := checkpoint.find(head)) is None:
        return
    if checkpoint.find(embed) is None:
        checkpoint.let_stand_in(stored, embed)
        return
    weights = checkpoint.read([head, embed])
    if not torch.equal(weights[head], weights[embed]):
        config.tie_word_embeddings = False
        say(
            f"{checkpoint.folder}: '{head}' differs from '{embed}' although config.json ties them: they are read as "
            "two tensors, as transformers does"
        )


def check_ids(ids: torch.Tensor, skeleton: Skeleton, folder: Path) -> None:
    """Refuse token ids beyond the model's embeddings."""
    rows = skeleton.model.get_input_embeddings().weight.shape[0]
    if ids.max() >= rows:
        raise LowbitError(
            f"the tokenizer in {folder} gives token {int(ids.max())}, the model has {rows} embeddings: they do not "
            "match"
        )
