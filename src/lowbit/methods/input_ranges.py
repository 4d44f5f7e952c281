"""Calibration of static inputs: the qparams of each linear's input, found on the block's quantized input stream.

A step that chooses or fits weights calls ``with_input_ranges`` first, so that codes are chosen for the inputs that
ship. Ranges belong to the block as its transforms leave it: a step that moves maps is given a block without them.
Linears that read one tensor share its range.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lowbit.distributed.exchange import with_tensors
from lowbit.methods.inputs import input_groups
from lowbit.models.block import Block, Calib
from lowbit.models.forward import observe
from lowbit.models.shard import Shard, own_states
from lowbit.quant.format import QParams
from lowbit.quant.range_estimators import ClusterCounts, ValueCounts, clipped_share
from lowbit.quant.static_activations import StaticActs
from lowbit.quant.static_clusters import StaticClusters


def static_groups(block: Block) -> list[tuple[tuple[str, ...], StaticActs]]:
    """Linears that share an input in a static format, in execution order, with that format."""
    groups = ((group, block.input_format(group[0])) for group in input_groups(block))
    return [(group, format) for group, format in groups if isinstance(format, StaticActs)]


def with_input_ranges(block: Block, calib: Calib, sizes: Mapping[str, Sequence[int]] | None = None) -> Block:
    """The block with qparams for every static input that has none.

    The ends of each range and the share of values outside are in the record, under ``input_ranges``. Values are those
    of the float layers on ``calib.x_q``, and the estimator is ``calib.input_range``.

    Args:
        block: the block.
        calib: the hidden states before it.
        sizes: channels of each cluster by linear, for inputs with a range for each; equal parts for others.
    """
    missing = [(group, format) for group, format in static_groups(block) if group[0] not in block.input_qparams]
    if not missing:
        return block
    seen = {group[0]: _counts(block, group[0], format, sizes or {}) for group, format in missing}
    if len(own := own_states(calib.x_q)):
        observe(block, own, {name: counts.add for name, counts in seen.items()}, batch=calib.batch)
    if isinstance(calib.x_q, Shard):
        _merge(seen.values())
    found: dict[str, QParams] = {}
    figures: dict[str, dict[str, float]] = {}
    for group, format in missing:
        counts = seen[group[0]]
        if isinstance(counts, ClusterCounts):
            low, high, share = calib.input_range.of_clusters(counts, format)
        else:
            low, high = calib.input_range.range(counts, format)
            share = clipped_share(counts, low, high)
        qparams = format.qparams(low.to(block.device), high.to(block.device))
        found |= dict.fromkeys(group, qparams)
        ends = {"low": float(low.min()), "high": float(high.max()), "clipped": share}
        figures |= dict.fromkeys(group, ends)
    return replace(block, input_qparams={**block.input_qparams, **found}).with_record("input_ranges", figures)


def _merge(seen: Iterable[ValueCounts | ClusterCounts]) -> None:
    """Make the counts of each process's own values those of all values: sums of integers, in any order."""
    flat = [part for own in seen for part in (own.parts if isinstance(own, ClusterCounts) else [own])]
    merged = [ValueCounts() for _ in flat]
    for _, tensors in with_tensors(None, [x for part in flat for x in (part.counts, part.low, part.high)]):
        for at, whole in enumerate(merged):
            whole.merge(*tensors[3 * at : 3 * at + 3])
    for part, whole in zip(flat, merged, strict=True):
        part.counts, part.low, part.high = whole.counts, whole.low, whole.high


def _counts(
    block: Block, linear: str, format: StaticActs, sizes: Mapping[str, Sequence[int]]
) -> ValueCounts | ClusterCounts:
    """Counts of all values of a linear's input, or of those of each cluster of its channels."""
    if not isinstance(format, StaticClusters):
        return ValueCounts()
    return ClusterCounts(sizes.get(linear) or format.parts(block.weight(linear).shape[1]))


def without_input_ranges(block: Block) -> Block:
    """The block as before calibration: static inputs take the range of the values at hand."""
    return replace(block, input_qparams={}) if block.input_qparams else block
