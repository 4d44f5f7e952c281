"""Tensors that a checkpoint stores one behind another, or several in one, and the library's loader rearranges.

OLMo Hybrid's files have a convolution each for queries, keys and values, which its class runs as one; HRM's have one
matrix for gate and up, which its class has apart. The loader's own rules say which tensors and in which order. Rules
that do more than that, and those of experts (``stored_experts``), are not followed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.stored import StoredRows


def settle_rows(checkpoint: Checkpoint, model: Any, shapes: Mapping[str, torch.Size]) -> None:
    """From now on ``checkpoint`` finds tensors of the model that its files store otherwise by rows.

    Args:
        checkpoint: the model's files, whose tensors have the model's names where they are the model's.
        model: the library's, possibly without memory.
        shapes: of the model's tensors by name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    missing = {name for name in shapes if not checkpoint.holders(name)}
    if not missing:
        return
    for rule in get_model_conversion_mapping(model):
        if isinstance(rule, WeightConverter):
            for name, rows in _rows_by(rule, checkpoint.names, model, shapes):
                if name in missing:
                    checkpoint.let_rows_stand_in(rows, name)


def _rows_by(
    rule: Any, stored: Sequence[str], model: Any, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, StoredRows]]:
    """What a rule of the loader's makes of stored tensors: the names that the model has, and the rows."""
    from transformers.core_model_loading import Chunk, Concatenate, Split

    operations = rule.operations
    if len(operations) != 1 or getattr(operations[0], "dim", None) != 0:
        return
    places: dict[str, dict[str, str]] = {}  # by the name that the rule gives, the tensor that each pattern finds
    for name in stored:
        target, pattern = rule.rename_source_key(name)
        if pattern is not None:
            places.setdefault(_listed(target, model, shapes), {})[pattern] = name
    for target, found in places.items():
        names = [target.replace(rule.target_patterns[0], pattern) for pattern in rule.target_patterns]
        ordered = tuple(found[pattern] for pattern in rule.source_patterns if pattern in found)
        known = type(operations[0]) in (Chunk, Split, Concatenate) and all(name in shapes for name in names)
        if known and len(ordered) == len(rule.source_patterns):
            ends = list(accumulate(shapes[name][0] for name in names))
            starts = [0, *ends[:-1]]
            for name, start, stop in zip(names, starts, ends, strict=True):
                yield name, StoredRows(ordered, start, stop, ends[-1])


def _listed(name: str, model: Any, shapes: Mapping[str, torch.Size]) -> str:
    """The model's name: checkpoints of base models lack the base's prefix."""
    base = f"{model.base_model_prefix}."
    return next((one for one in (name, base + name, name.removeprefix(base)) if one in shapes), name)
