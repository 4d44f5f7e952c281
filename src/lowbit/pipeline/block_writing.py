"""A quantized block is checked and written into the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoints.writing import write_json, write_tensors
from lowbit.errors import LowbitError
from lowbit.finite import is_finite
from lowbit.methods.method import Method
from lowbit.models.block import Block
from lowbit.models.runtime_ops import tensor_name
from lowbit.models.stored_names import StoredNames
from lowbit.pipeline.peak_memory import peak_memory_bytes
from lowbit.quant.scales import TwoLevel, shared_exponent
from lowbit.quant.static_activations import StaticActs
from lowbit.runs.folder import block_file, notes_file, pictures_file


def check_block(block: Block, steps: Sequence[Method]) -> None:
    """Check a quantized block before it is written: codes of all planned linears, finite values, declared ops.

    Args:
        block: the block.
        steps: those that have made it.

    Raises:
        LowbitError: values that are NaN or infinite, or beyond their stored dtype.
        RuntimeError: what a step has done without saying so.
    """
    if set(block.qweights) != set(block.formats):
        unmatched = sorted(set(block.qweights) ^ set(block.formats))
        raise RuntimeError(f"block {block.start}: codes and plan differ for {unmatched}")
    _check_ops(block, steps)
    static = {name for name in block.formats if isinstance(block.input_format(name), StaticActs)}
    if set(block.input_qparams) != static:
        raise RuntimeError(f"block {block.start}: static inputs without qparams, or qparams without such inputs")
    tensors = {**block.params, **{name: q.qparams.scale for name, q in block.qweights.items()}}
    tensors |= {f"{name} input": own.scale for name, own in block.input_qparams.items()}
    tensors |= {f"{name} {k}": v for name, op in block.ops.items() for k, v in op.to_tensors().items()}
    for name, value in tensors.items():
        if not is_finite(value):
            raise LowbitError(f"block {block.start}: '{name}' became NaN or infinite; the block was not written")
    for name, q in block.qweights.items():
        if not q.format.fits_scale_dtype(q.qparams):
            raise LowbitError(
                f"block {block.start}: the weights of '{name}' are so large that their scale exceeds its stored "
                "dtype; the checkpoint is broken, or the recipe scaled the weights too far"
            )


def _check_ops(block: Block, steps: Sequence[Method]) -> None:
    """Check that every runtime op is declared by a step: targets are checked against these declarations."""
    inputs = {formats.input for formats in block.formats.values()} or {None}
    declared = {op for step in steps for act in inputs for op in step.runtime_ops(act)}
    for name, op in block.ops.items():
        if type(op) not in declared:
            raise RuntimeError(f"block {block.start}: no step declares the {op.kind} at {name}")


def write_block(out: Path, block: Block, names: StoredNames, sensitivity: Mapping[int, Any], seconds: float) -> None:
    """Write a block's notes, pictures and, last, its shards, one for each layer.

    Args:
        out: the run folder.
        block: the block, checked.
        names: what its tensors are called in files.
        sensitivity: figures of each layer's linears.
        seconds: that it took.
    """
    for index in block.indices:
        prefix = f"{index}."
        tensors: dict[str, Tensor] = {}
        for name, value in block.as_stored(block.params).items():
            linear = name.removesuffix(".weight")
            if name.startswith(prefix) and linear not in block.qweights:
                tensors[block.full_name(name)] = value.cpu()
        for name, op in block.ops.items():
            if name.startswith(prefix):
                stored = op.to_tensors().items()
                named = {tensor_name(block.full_name(name), op, key): value for key, value in stored}
                tensors |= {key: value.cpu().clone() for key, value in named.items()}  # ops may share tensors
        for linear, q in block.qweights.items():
            if linear.startswith(prefix):
                packed = block.formats[linear].layout.pack(q, shared_exponent_of(block, linear))
                tensors |= {f"{block.full_name(linear)}.{key}": value.cpu() for key, value in packed.items()}
        for linear, qparams in block.input_qparams.items():
            format = block.input_format(linear)
            if linear.startswith(prefix) and isinstance(format, StaticActs):
                packed = format.pack(qparams)
                tensors |= {f"{block.full_name(linear)}.{key}": value.cpu() for key, value in packed.items()}
        notes = [note.text for note in block.notes if note.layer == index]
        figures = {"steps": dict(block.record[index])} if index in block.record else {}
        record = {
            "notes": notes,
            "record": {**figures, "sensitivity": sensitivity[index]},
            "seconds": seconds / len(block.layers),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_json(out / notes_file(index), record)
        pictures = {name: value.cpu() for name, value in block.pictures.items() if name.startswith(prefix)}
        if pictures:
            write_tensors(out / pictures_file(index), pictures)
        write_tensors(out / block_file(index), names.stored_all(tensors))


def shared_exponent_of(block: Block, linear: str) -> int | None:
    """The exponent of the tensors' power of two that fused linears share; ``None`` for formats without one."""
    if not isinstance(block.weight_format(linear).scales, TwoLevel):
        return None
    fused = block.fused_with(linear)
    exponent = shared_exponent([block.qweights[name].qparams.scale for name in fused])
    if exponent is None:
        raise RuntimeError(f"the scales of {', '.join(fused)} have no power of two in common")
    return exponent
