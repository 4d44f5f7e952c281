"""Hadamard transforms on the inputs of linears as compressed-tensors' ``transform_config``, which vLLM reads.

A group of the config is ``{type: hadamard, head_dim: N, apply: [{location: input, targets: NAMES}]}``: the input of
each named linear is multiplied, in blocks of ``N``, by Sylvester's matrix over ``sqrt(N)``, which is what
``FixedHadamard`` computes. An op behind a norm is stated for every linear that reads the norm. The matrix is not
stored. Weights hold its inverse already, so nothing is said of them.

Limits of vLLM, from its source of 2026 (``compressed_tensors/transform/``), not from running it: it refuses linears
with a bias behind a transform, and more than one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.exporters.fit import Misfit
from lowbit.exporters.run import Run, Subject
from lowbit.models.families import architecture_of
from lowbit.models.fixed_hadamard import FixedHadamard
from lowbit.models.op_readers import linears_at
from lowbit.models.runtime_ops import RuntimeOp, tensor_name
from lowbit.models.skeleton import Skeleton
from lowbit.quant.integer import IntFormat

OPS: frozenset[type[RuntimeOp]] = frozenset({FixedHadamard})
KEY = "transform_config"  # of quantization_config
LOCATION = "input"


def limits(subject: Subject) -> Misfit | None:
    """Integer weights, and no transforms before linears with a bias."""
    if not OPS & subject.ops.keys():
        return None
    if any(not isinstance(format, IntFormat) for format in subject.weights.values()):
        why = "transforms are written with integer weights only; leave transforms out (--merge-only)"
        return Misfit("recipe", why)
    blocks = architecture_of(subject.config).blocks
    for index, layer in enumerate(Skeleton(subject.config).layers):
        for name, module in layer.named_modules():
            full = f"{blocks}.{index}.{name}"
            if full in subject.shapes and getattr(module, "bias", None) is not None:
                why = f"{full} has a bias, which vLLM refuses behind a transform; leave transforms out (--merge-only)"
                return Misfit("recipe", why)
    return None


def transform_config(run: Run) -> dict[str, Any] | None:
    """The ``transform_config`` of a run; ``None`` if it has no transforms."""
    groups: dict[str, Any] = {}
    for place, op in run.ops().items():
        assert isinstance(op, FixedHadamard), "others are refused before"
        new = {"type": "hadamard", "head_dim": op.size, "apply": [{"targets": [], "location": LOCATION}]}
        group = groups.setdefault(f"hadamard_{op.size}", new)
        group["apply"][0]["targets"] += linears_at(architecture_of(run.subject.config), place)
    for group in groups.values():
        group["apply"][0]["targets"].sort()
    return {"config_groups": dict(sorted(groups.items()))} if groups else None


def read(run: Run, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the run's ops, as an export's ``quantization_config`` states them.

    A place whose linears do not all have one transform is left out.
    """
    stated: dict[str, int] = {}
    for group in ((config.get(KEY) or {}).get("config_groups") or {}).values():
        for apply in group["apply"]:
            if group["type"] == "hadamard" and apply["location"] == LOCATION:
                stated |= dict.fromkeys(apply["targets"], int(group["head_dim"]))
    for place, kind in run.manifest.runtime_ops.items():
        linears = linears_at(architecture_of(run.subject.config), place)
        sizes = {stated.get(name) for name in linears}
        if kind == FixedHadamard.kind and len(sizes) == 1 and (size := sizes.pop()) is not None:
            width = run.subject.shapes[linears[0]][1]
            yield tensor_name(place, FixedHadamard, "sizes"), torch.full((width // size,), float(size))
