"""Quantizes linears in execution order, each for its input in the model that is quantized up to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from lowbit.methods.cold import is_cold, quantized_without_data, with_cold_note
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.inputs import stages
from lowbit.methods.statistics import Statistics
from lowbit.models.block import Block, Calib

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
        quantize: the block with codes for linears that share an input, ``(block, linears, *figures)``.
        without_data: the same without figures; by default codes of the scales that suit the weights best.

    Linears of experts that too few tokens reach are quantized without calibration data, and a note says so.
    """
    block = with_input_ranges(block, calib)
    cold: dict[str, int] = {}
    for groups in stages(block, len(figures)):
        seen = observe(block, calib, [linears[0] for linears in groups])
        for linears in groups:
            moments = seen.pop(linears[0])
            if is_cold(block, linears[0], moments.count):
                block = (without_data or _without_data)(block, linears)
                cold[linears[0]] = moments.count
            else:
                second: list[Tensor] = [moments[figure] for figure in figures]
                block = quantize(block, linears, *second)
    return with_cold_note(block, step, cold, "quantized without calibration data")


def _without_data(block: Block, linears: Sequence[str]) -> Block:
    return replace(block, qweights={**block.qweights, **quantized_without_data(block, linears)})
