"""Experts that too few calibration tokens reach: steps treat their linears without calibration data.

An expert sees the tokens that the router sends to it, so in a mixture of many experts some see next to none. The mean
square of a channel over ``n`` tokens has a relative standard error of ``sqrt(2 / n)`` (of normal values): 18 % at 64
tokens, the default of ``Block.least_tokens``, 50 % at 8. Below the limit second moments say more of the few tokens
than of the expert, and each step takes what it can say of the weights alone: scales by their squared error, no
transform, no compensation. A note records it, with the counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lowbit.models.block import Block
from lowbit.models.edges import Edge
from lowbit.quant.format import QTensor
from lowbit.quant.scale_search import search_scales


def is_cold(block: Block, linear: str, tokens: int) -> bool:
    """Whether ``tokens`` are too few for statistics of a linear's input; only linears of experts are ever cold."""
    return block.expert_of(linear) is not None and tokens < max(block.least_tokens, 1)


def is_cold_edge(block: Block, edge: Edge, tokens: int) -> bool:
    """Whether ``tokens`` are too few for a map across an edge between two linears of an expert."""
    return is_cold(block, edge.readers[0].module, tokens)


def quantized_without_data(block: Block, linears: Iterable[str]) -> dict[str, QTensor]:
    """Codes by linear, rounded to nearest with the scales of least squared error of the weights themselves."""
    out = {}
    for linear in linears:
        weight, format = block.weight(linear), block.weight_format(linear)
        qparams = search_scales(weight, format, block.qparams(linear), None, block.tensor_peak(linear))
        out[linear] = format.quantize(weight, qparams)
    return out


def with_cold_note(block: Block, step: str, cold: Mapping[str, int], what: str) -> Block:
    """The block with a note for each layer on its cold experts, by linear with the tokens that reach it."""
    by_layer: dict[int, dict[int, int]] = {}
    for linear, tokens in cold.items():
        number = block.expert_of(linear)
        assert number is not None
        by_layer.setdefault(int(linear.partition(".")[0]), {})[number] = tokens
    for layer, counts in by_layer.items():
        said = ", ".join(f"{number} ({tokens})" for number, tokens in sorted(counts.items()))
        text = f"fewer than {block.least_tokens} calibration tokens reach these experts, {what}: {said}"
        block = block.with_notes(step, text, layer=layer)
    return block


def moments_or_identity(block: Block, linear: str, gram: Tensor | None) -> Tensor:
    """Second moments of a linear's input ``(in, in)``; the identity, with which errors are those of the weights."""
    if gram is not None:
        return gram
    weight = block.weight(linear)
    return torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
