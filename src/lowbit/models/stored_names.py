"""The names that a model's tensors have in its checkpoint, by the library's own rules of conversion.

Its loader renames tensors and puts each layer's experts together; its writer undoes that. A checkpoint may hold
either side, and a model's tensors are found by the names that blocks use, whatever it holds:

* another name of a tensor (Mixtral's ``block_sparse_moe.gate.weight`` for ``mlp.gate.weight``) stands in for it;
* an expert's matrix that is only stored with all others is a part of the tensor that holds them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lowbit.checkpoints.safetensors_folder import Checkpoint, StoredPart
from lowbit.models.architecture import Architecture
from lowbit.models.experts import stored_in


def settle_names(checkpoint: Checkpoint, model: Any, architecture: Architecture, names: Iterable[str]) -> None:
    """From now on ``checkpoint`` finds the tensors of ``model``, which may be empty, by the ``names`` of blocks."""
    missing = {name for name in names if checkpoint.find(name) is None}
    if missing:
        _stand_ins(checkpoint, model, missing)
        _parts(checkpoint, architecture, {name for name in missing if checkpoint.find(name) is None})


def _stand_ins(checkpoint: Checkpoint, model: Any, missing: set[str]) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    for stored in checkpoint.names if rules else ():
        name = apply_renamings(stored, rules)
        if name in missing and name != stored:
            checkpoint.let_stand_in(stored, name)


def _parts(checkpoint: Checkpoint, architecture: Architecture, missing: set[str]) -> None:
    for index, kind in enumerate(architecture.layers):
        prefix = f"{architecture.blocks}.{index}."
        if kind.experts is None:
            continue
        for name in missing:
            if name.startswith(prefix) and (found := stored_in(kind.experts, name.removeprefix(prefix))) is not None:
                parameter, number, linear = found
                if (stored := checkpoint.find(f"{prefix}{parameter}")) is not None:
                    part = StoredPart(stored, number, linear.rows, kind.experts.transposed)
                    checkpoint.let_part_stand_in(part, name)
