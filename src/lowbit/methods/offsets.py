"""Copy-aware rounding: the copies of a split channel round to different codes, which together are finer.

Copies of one channel hold the same number, so that rounding to nearest gives all of them one code and one error ``T``
times over. With the offset ``(t + 1/2) / T`` in the place of ``1/2`` for copy ``t``, Hermite's identity

    sum_t floor(y + (t + 1/2) / T) = floor(T y + 1/2)

makes their sum as good as a rounding with a step ``T`` times smaller. Not in QLLM (Liu et al., arXiv 2310.08041).

* Weights: offsets of the ``T`` equal columns sum to 0, so adding ``step * offset`` to the columns leaves the float
  function alone, and rounding to nearest does the rest: nothing is stored, every runtime takes it. The addition
  shrinks near the ends of a row's range, so that no range grows.
* Activations: one constant for each channel of a linear's input, added before rounding. It stays online.
* Where both are on, copies with a larger activation code must not have the larger weights too, or the products'
  errors add up: weights take the offsets upwards or downwards by the parity of row and channel.

GPTQ after the split does for weights what the offsets do and more: it sees copies as inputs that correlate fully.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.models.block import Block
from lowbit.models.runtime_ops import Clip

OFFSETS = ("none", "weights", "both")


def copy_offsets(idx: Tensor, copies: Tensor) -> Tensor:
    """``(t + 1/2) / T - 1/2`` for each new channel, 0 for those that are not split; ``(width,)`` float64, in steps.

    Args:
        idx: for each new channel the old one, ``(width,)``.
        copies: the number of copies ``T`` of each old channel, ``(channels,)``.

    >>> copy_offsets(torch.tensor([0, 1, 1, 3]), torch.tensor([1, 2, 1, 1])).tolist()
    [0.0, -0.25, 0.25, 0.0]
    """
    out = torch.zeros(len(idx), dtype=torch.float64, device=idx.device)
    for channel in torch.nonzero(copies > 1).flatten().tolist():
        places = torch.nonzero(idx == channel).flatten()
        t = torch.arange(len(places), dtype=torch.float64, device=idx.device)
        out[places] = (t + 0.5) / len(places) - 0.5
    return out


def offset_weight(weight: Tensor, step: Tensor, offsets: Tensor, idx: Tensor) -> Tensor:
    """``weight`` ``(out, width)`` with each copy moved by its offset; a copy's sum and a row's range stay.

    Args:
        weight: with equal columns where ``idx`` is equal.
        step: of each row's grid, ``(out, 1)``.
        offsets: of ``copy_offsets``.
        idx: as there.
    """
    top = weight.amax(1, keepdim=True).clamp(min=0)
    bottom = weight.amin(1, keepdim=True).clamp(max=0)
    room = torch.minimum(2 * torch.minimum(top - weight, weight - bottom), step.to(weight.dtype))
    rows = torch.arange(len(weight), device=weight.device)
    sign = 1 - 2 * ((rows[:, None] + idx) % 2)
    return weight + room * sign * offsets.to(weight.dtype)


def with_offsets(block: Block, readers: list[str], idx: Tensor, copies: Tensor, kind: str) -> Block:
    """``block``, just folded, with the offsets of ``kind`` at its linears ``readers``.

    Raises:
        LowbitError: the weights have groups: then copies have steps of their own.
    """
    offsets = copy_offsets(idx, copies)
    if kind == "none" or not bool(offsets.any()):
        return block
    params, ops = dict(block.params), dict(block.ops)
    for name in readers:
        format, weight = block.weight_format(name), block.weight(name)
        if format.group is not None:
            raise LowbitError(
                f"reassemble: offsets '{kind}' with groups of {format.group} given: copies in different groups "
                "have different steps, which do not add up; take a scheme without g, or offsets 'none'"
            )
        step = block.qparams(name).scale
        params[f"{name}.weight"] = offset_weight(weight.double(), step, offsets, idx).to(weight.dtype).contiguous()
        inputs = block.input_format(name)
        if kind == "both" and inputs is not None and inputs.clippable:
            before = ops.get(name)
            ratios = before.ratios if isinstance(before, Clip) else torch.ones(2, device=weight.device)
            ops[name] = Clip(ratios, offsets.to(ratios.dtype))
    return replace(block, params=params, ops=ops)
