"""AdamW without weight decay, with one step counter per *entry* and an epsilon relative to the tensor's gradients.

An entry that a mask opens late starts with zero moments; a step counter shared by the tensor would make its first
step about three times too long. That rules out ``torch.optim.AdamW(fused=True)``, which has one for each tensor.

Adam's epsilon of 1e-8 is absolute: where gradients come near it, steps shrink, so that the scale of the loss decides
how fast is learned. Errors here are relative to the block's output, and the gradient of a clipping ratio falls with
the number of groups: at two bits, groups of 64 and the width of a 7B model it is of the order of 1e-9. So epsilon is
1e-8 of the root mean square of the tensor's gradients, and a loss times any factor gives the same steps. Where that
root mean square is 1 and every entry is trained from the start, this equals ``torch.optim.AdamW`` up to the order of
operations.

A correction of the whole model trains hundreds of small tensors, for each of which a dozen operations cost more to
launch than to compute. So moments lie one behind the other in buckets, an operation works on a bucket, and what is a
tensor's own (its epsilon, its learning rate) enters through lists. No entry's value depends on the bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8
TABLE = 4096  # powers that are computed together
BUCKET = (
    1 << 18
)  # values of a bucket, unless a tensor alone has more: what is computed beside the moments stays small


class Moments(NamedTuple):
    """Running means of gradients and of their squares, and the steps that each entry has taken."""

    mean: Tensor
    square: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Bucket:
    """Tensors of one dtype and device, with their moments one behind the other.

    Attributes:
        tensors: the tensors.
        rates: their learning rates, above 0.
        moments: ``(values,)`` each.
    """

    tensors: list[Tensor]
    rates: list[float]
    moments: Moments

    @cached_property
    def sizes(self) -> list[int]:
        """The number of values of each tensor."""
        return [tensor.numel() for tensor in self.tensors]

    @cached_property
    def repeats(self) -> Tensor:
        """``sizes`` on the tensors' device."""
        return torch.tensor(self.sizes, device=self.moments.mean.device)

    @cached_property
    def places(self) -> list[Tensor]:
        """The tensors' memory; in one dimension, as moments have, where they are contiguous."""
        return [t.detach().view(-1) if t.is_contiguous() else t.detach() for t in self.tensors]

    def parts(self) -> list[Bucket]:
        """A bucket for each tensor, whose moments are views of this one's."""
        split = [value.split(self.sizes) for value in self.moments]
        return [
            Bucket([tensor], [rate], Moments(*own))
            for tensor, rate, *own in zip(self.tensors, self.rates, *split, strict=True)
        ]

    def step(self, factor: float, most: int) -> None:
        """One update, with learning rates times ``factor``; no entry takes more than its ``most``-th step."""
        mean, square, taken = self.moments
        grad = torch.cat([tensor.grad.reshape(-1) for tensor in self.tensors if tensor.grad is not None])
        taken.add_(((taken > 0) | (grad != 0)).to(taken.dtype))
        mean.lerp_(grad, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        del grad
        steps = taken.clamp(min=1).int()
        # Powers of a few numbers, looked up: a power for every entry takes as long as the rest together.
        # The last bit of a power depends on how many are computed at once: on no more than their thousands here.
        counts = torch.arange(-(-(most + 1) // TABLE) * TABLE, dtype=mean.dtype, device=mean.device)
        power = square / (1 - BETAS[1] ** counts).index_select(0, steps)
        unbiased = mean / (1 - BETAS[0] ** counts).index_select(0, steps)
        powers = power.split(self.sizes)
        sizes_of_gradients = torch.stack([part.mean() for part in powers]).sqrt()
        # The smallest number keeps 0 / 0 out where no entry has had a gradient.
        epsilon = (EPS * sizes_of_gradients).clamp(min=torch.finfo(power.dtype).tiny)
        power.sqrt_().add_(epsilon.repeat_interleave(self.repeats, output_size=len(power)))
        means, roots = self._like_places(unbiased.split(self.sizes)), self._like_places(powers)
        torch._foreach_addcdiv_(self.places, means, roots, [-rate * factor for rate in self.rates])

    def _like_places(self, parts: Iterable[Tensor]) -> list[Tensor]:
        pairs = zip(parts, self.places, strict=True)
        return [part if place.dim() == 1 else part.view_as(place) for part, place in pairs]


class Adam:
    """The optimizer of ``(tensors, learning rate)`` groups; see the module docstring.

    Attributes:
        tensors: all tensors, in the order of the groups.
        moments: their moments, views of the buckets'. Whoever writes to them calls ``counted``.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]]) -> None:
        self.tensors = [tensor for tensors, _ in groups for tensor in tensors]
        rates = [lr for tensors, lr in groups for _ in tensors]
        self.moments: list[Moments] = []
        self._buckets: list[Bucket] = []
        self._most = 0
        open_at: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        parts: list[list[int]] = []
        for index, tensor in enumerate(self.tensors):
            part = open_at.get(key := (tensor.dtype, tensor.device))
            if part is None or sum(self.tensors[i].numel() for i in part) + tensor.numel() > BUCKET:
                parts.append(part := [])
                open_at[key] = part
            part.append(index)
        made: dict[int, Moments] = {}
        for part in parts:
            bucket = _bucket([self.tensors[i] for i in part], [rates[i] for i in part])
            for index, own in zip(part, bucket.parts(), strict=True):
                made[index] = Moments(*(value.view(self.tensors[index].shape) for value in own.moments))
            self._buckets.append(bucket)
        self.moments = [made[index] for index in range(len(self.tensors))]

    def counted(self) -> None:
        """Take note of step counters that were written from outside, by a fit that is resumed."""
        self._most = max((int(own.steps.max()) for own in self.moments if own.steps.numel()), default=0)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update from the tensors' gradients, with learning rates times ``factor``.

        Tensors without a gradient, or with a learning rate of 0, stay as they are, and so do their moments.
        """
        self._most += 1
        for bucket in self._buckets:
            pairs = zip(bucket.tensors, bucket.rates, strict=True)
            moved = [tensor.grad is not None and rate > 0 for tensor, rate in pairs]
            parts = [bucket] if all(moved) else [p for p, moves in zip(bucket.parts(), moved, strict=True) if moves]
            for part in parts:
                part.step(factor, self._most)


def _bucket(tensors: list[Tensor], rates: list[float]) -> Bucket:
    count, first = sum(tensor.numel() for tensor in tensors), tensors[0]
    zeros = (torch.zeros(count, dtype=first.dtype, device=first.device) for _ in Moments._fields)
    return Bucket(tensors, rates, Moments(*zeros))
