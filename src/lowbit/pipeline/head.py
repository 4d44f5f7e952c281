"""Codes of embedding and head, which are outside the blocks: searched scales, and GPTQ of the head.

The head is a linear whose input is the last block's output behind the final norm, so GPTQ applies to it as to any
other: with the second moments of that input in the quantized model, which are known only behind the last block.

An embedding's row is looked up whole. How often its token occurs multiplies the errors of all its groups alike, and
every scale belongs to groups of one row: so the best scales do not depend on frequencies, and the search needs none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.methods.gptq import GPTQ, GRAMS, inverse_factor
from lowbit.methods.gptq_columns import gptq_codes
from lowbit.methods.options import options_of
from lowbit.methods.statistics import Statistics, over_leaves
from lowbit.models.shard import States
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.recipe import Recipe
from lowbit.progress import say
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format, QTensor
from lowbit.quant.scale_search import search_scales
from lowbit.runs.plan import Plan

MICRO_BATCH = 4  # windows


def head_step(recipe: Recipe, plan: Plan) -> GPTQ | None:
    """The step that quantizes the head with the last hidden states; ``None``: it is rounded to nearest.

    A head that shares its matrix and its format with the embedding keeps the embedding's codes, so that the two stay
    one matrix in an export.
    """
    step, formats = recipe.block_steps[-1][1], plan.formats.weights
    if not isinstance(step, GPTQ) or not step.head or plan.head not in formats:
        return None
    return None if plan.untie and formats.get(plan.embed) == formats[plan.head] else step


def nearest(weight: Tensor, format: Format, recipe: Recipe) -> QTensor:
    """A weight ``(out, in)`` rounded to nearest, with searched scales if the recipe's last block step searches."""
    qparams = format.qparams(weight)
    if options_of(recipe.block_steps[-1][1]).get("search") is True:
        qparams = search_scales(weight, format, qparams)
    return format.quantize(weight, qparams)


@torch.no_grad()
def head_gram(skeleton: Skeleton, ids: Tensor, hidden: States, step: GPTQ, inputs: ActFormat | None) -> Tensor:
    """Second moments ``(in, in)`` of the head's input, over windows that the processes of a job share.

    Args:
        skeleton: the model around the blocks, filled.
        ids: ``(sequences, length)``.
        hidden: the last block's output for them ``(sequences, length, width)``.
        step: whose ``tokens`` says whether tokens are normalized.
        inputs: the format of the head's input; ``None``: float.
    """
    head, figure = skeleton.model.get_submodule(skeleton.architecture.head), GRAMS[step.tokens]
    device = head.weight.device

    def of_leaf(part: slice) -> dict[str, Statistics]:
        found = Statistics((figure,))
        for row in range(len(ids))[part]:
            seen: list[Tensor] = []
            handle = head.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            try:
                skeleton.logits(ids[row : row + 1].to(device), hidden[row : row + 1].to(device))
            finally:
                handle.remove()
            x = seen[-1]  # a model may call its head for nothing before
            found.add(x if inputs is None else inputs.fake_quant(x.float().flatten(0, -2)))
        return {figure: found}

    return over_leaves(len(ids), MICRO_BATCH, of_leaf)[figure][figure]


def head_codes(weight: Tensor, format: Format, gram: Tensor, tokens: int, step: GPTQ) -> QTensor:
    """GPTQ's codes of the head ``(vocabulary, in)`` for an input with second moments ``gram`` ``(in, in)``.

    The moments are of ``tokens`` tokens.

    Scales of 1 and two inputs that are always equal: the second column takes over the error of the first, 0.4.

    >>> from lowbit.quant.integer import IntFormat
    >>> weight = torch.tensor([[0.4, 0.3, -7.5]])
    >>> gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> codes = head_codes(weight, IntFormat(4), gram, 100_000, GPTQ(act_order=False))
    >>> [[round(value) for value in row] for row in codes.dequantize().tolist()]
    [[0, 1, -8]]
    """
    columns = step.columns(len(gram), tokens)
    strength = gram.diagonal()
    order = columns.order(strength)
    upper, damping = inverse_factor(gram[order][:, order], columns.damping, columns.step)
    if damping != columns.damping:
        say(f"gptq: damping raised from {columns.damping:g} to {damping:g} for the head")
    qparams = format.qparams(weight)
    if columns.search:
        qparams = search_scales(weight, format, qparams, strength)
    return QTensor(gptq_codes(weight, upper, order, qparams, format, columns.block_size), qparams, format)
