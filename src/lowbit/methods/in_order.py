"""Quantizes linears in execution order, each for its input in the model that is quantized up to it.

The processes of a job share the statistics, and the linears behind them: where inputs do not depend on each other, as
those of the experts of a layer, each process quantizes the linears of some of the inputs; of others it takes a share
of the rows (``gptq_columns.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from lowbit.distributed.exchange import with_tensors
from lowbit.distributed.share import own_items
from lowbit.distributed.world import ONE, here, within
from lowbit.methods.cold import is_cold, quantized_without_data, with_cold_note
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.inputs import stages
from lowbit.methods.statistics import Statistics
from lowbit.models.block import Block, Calib, Note
from lowbit.quant.format import QParams, QTensor

Observe = Callable[[Block, Calib, Sequence[str]], dict[str, Statistics]]


def quantized_in_order(
    block: Block,
    calib: Calib,
    step: str,
    figures: Sequence[str],
    observe: Observe,
    quantize: Callable[..., Block],
    without_data: Callable[[Block, Sequence[str]], Block] | None = None,
) -> Block:
    """The block with codes for every linear that has a format.

    Args:
        block: the block.
        calib: its hidden states.
        step: the method's name, for notes.
        figures: names of the ``(in, in)`` figures of ``statistics.py`` that ``quantize`` takes.
        observe: these figures of linears' inputs in the block with the codes so far.
        quantize: the block with codes for linears that share an input, ``(block, linears, tokens, *figures)``;
            ``tokens`` is the number of tokens behind the figures.
        without_data: the same without figures; by default codes of the scales that suit the weights best.

    Linears of experts that too few tokens reach are quantized without calibration data, and a note says so.
    """
    block = with_input_ranges(block, calib)
    cold: dict[str, int] = {}

    def of_group(seen: dict[str, Statistics], done: Block, linears: Sequence[str]) -> Block:
        moments = seen.pop(linears[0])
        if linears[0] in cold:
            return (without_data or _without_data)(done, linears)
        second: list[Tensor] = [moments[figure] for figure in figures]
        return quantize(done, linears, moments.count, *second)

    for groups in stages(block, len(figures)):
        seen = observe(block, calib, [linears[0] for linears in groups])
        counts = {linears[0]: seen[linears[0]].count for linears in groups}
        cold |= {name: count for name, count in counts.items() if is_cold(block, name, count)}
        block = _stage(block, groups, partial(of_group, seen))
    return with_cold_note(block, step, cold, "quantized without calibration data")


def _stage(
    block: Block, groups: Sequence[tuple[str, ...]], of_group: Callable[[Block, Sequence[str]], Block]
) -> Block:
    """The block with codes for all groups, none of which depends on another."""
    if here().size == 1 or len(groups) < here().size:
        for linears in groups:
            block = of_group(block, linears)
        return block
    done, own = block, own_items(groups)
    with within(ONE):
        for linears in own:
            done = of_group(done, linears)
    names = [name for linears in own for name in linears]
    notes = [[note.layer, note.text] for note in done.notes[len(block.notes) :]]
    tensors = [tensor for name in names for tensor in (done.qweights[name].codes, *done.qweights[name].qparams)]
    qweights, added = dict(block.qweights), list(block.notes)
    for (others, told), found in with_tensors([names, notes], tensors):
        values = iter(found)
        for name in others:
            qweights[name] = QTensor(next(values), QParams(next(values), next(values)), block.weight_format(name))
        added += [Note(layer, text) for layer, text in told]
    return replace(block, qweights=qweights, notes=tuple(added))


def _without_data(block: Block, linears: Sequence[str]) -> Block:
    return replace(block, qweights={**block.qweights, **quantized_without_data(block, linears)})
