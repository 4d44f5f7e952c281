"""Copy-aware rounding: offsets between the copies of a split channel, so that their sum has a finer step.

Copies of one channel have the same value, so rounding to nearest gives them the same code and ``T`` times the same
error. With the offset ``(t + 1/2) / T`` in place of ``1/2`` for copy ``t``, Hermite's identity

    sum_t floor(y + (t + 1/2) / T) = floor(T y + 1/2)

makes their sum as accurate as rounding with a step ``T`` times smaller. Not in QLLM (Liu et al., arXiv 2310.08041).

* Weights: the offsets of the ``T`` equal columns sum to 0, so adding ``step * offset`` to the columns leaves the
  float function unchanged. Nothing is stored, and every runtime supports it. Near the ends of a row's range the
  offset shrinks, so that no range grows.
* Activations: one constant per channel of a linear's input, added before rounding. It stays online.
* With both, copies with the larger activation code must not always have the larger weight, or the errors of the
  products add up: the sign of a weight's offset alternates with the parity of row and channel.

GPTQ after the split achieves the same for weights and more: copies are fully correlated inputs, so each compensates
for the error of the preceding ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.models.block import Block
from lowbit.models.runtime_ops import Clip
from lowbit.quant.integer import IntFormat

OFFSETS = ("none", "weights", "both")


def copy_offsets(idx: Tensor, copies: Tensor) -> Tensor:
    """``(t + 1/2) / T - 1/2`` for each new channel, 0 where it is not split; ``(width,)`` float64, in steps.

    Args:
        idx: the old index of each new channel, ``(width,)``.
        copies: the number of copies ``T`` of each old channel, ``(channels,)``.

    >>> copy_offsets(torch.tensor([0, 1, 1, 3]), torch.tensor([1, 2, 1, 1])).tolist()
    [0.0, -0.25, 0.25, 0.0]
    """
    out = torch.zeros(len(idx), dtype=torch.float64, device=idx.device)
    for channel in torch.nonzero(copies > 1).flatten().tolist():
        positions = torch.nonzero(idx == channel).flatten()
        t = torch.arange(len(positions), dtype=torch.float64, device=idx.device)
        out[positions] = (t + 0.5) / len(positions) - 0.5
    return out


def offset_weight(weight: Tensor, step: Tensor, offsets: Tensor, idx: Tensor) -> Tensor:
    """``weight`` ``(out, width)`` with offset copies; the sum over copies and each row's range are unchanged.

    Args:
        weight: with equal columns where ``idx`` is equal.
        step: scale of each row, ``(out, 1)``.
        offsets: from ``copy_offsets``.
        idx: as for ``copy_offsets``.
    """
    top = weight.amax(1, keepdim=True).clamp(min=0)
    bottom = weight.amin(1, keepdim=True).clamp(max=0)
    room = torch.minimum(2 * torch.minimum(top - weight, weight - bottom), step.to(weight.dtype))
    rows = torch.arange(len(weight), device=weight.device)
    sign = 1 - 2 * ((rows[:, None] + idx) % 2)
    return weight + room * sign * offsets.to(weight.dtype)


def with_offsets(block: Block, readers: list[str], idx: Tensor, copies: Tensor, kind: str) -> Block:
    """``block`` after ``reassemble.fold``, with the offsets of ``kind`` at its linears ``readers``.

    Raises:
        LowbitError: the weights have groups, so that copies can have different steps.
    """
    offsets = copy_offsets(idx, copies)
    if kind == "none" or not bool(offsets.any()):
        return block
    params, ops, skipped = dict(block.params), dict(block.ops), list[str]()
    for name in readers:
        format, weight = block.weight_format(name), block.weight(name)
        if format.group is not None:
            raise LowbitError(
                f"reassemble: offsets '{kind}' with groups of {format.group} given: copies in different groups "
                "have different steps; choose a scheme without groups, or offsets 'none'"
            )
        if not isinstance(format, IntFormat):
            raise LowbitError(
                f"reassemble: offsets '{kind}' with weights in {format.name} given: steps between floating-point "
                "values differ; choose a scheme of integers, or offsets 'none'"
            )
        step = block.qparams(name).scale
        params[f"{name}.weight"] = offset_weight(weight.double(), step, offsets, idx).to(weight.dtype).contiguous()
        inputs = block.input_format(name)
        if kind == "both" and inputs is not None and inputs.clippable:
            op = ops.get(name)
            ratios = op.ratios if isinstance(op, Clip) else torch.ones(2, device=weight.device)
            ops[name] = Clip(ratios, offsets.to(ratios.dtype))
        elif kind == "both":
            skipped.append(name)
    done = replace(block, params=params, ops=ops)
    text = f"offsets of inputs need ranges that are found while the model runs: not for {', '.join(skipped)}"
    return done.with_notes("reassemble", text) if skipped else done
