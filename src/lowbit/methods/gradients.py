"""Gradients of a step: sums over its micro-batches, in an order that does not depend on the number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.distributed.exchange import total
from lowbit.distributed.tree import Node, Tree, leaves, own_part
from lowbit.distributed.world import here


@dataclass
class Partial:
    """The loss and the gradients of some micro-batches.

    Attributes:
        loss: their share of the step's mean loss, a scalar.
        grads: by number of the tensor; a tensor on which the loss does not depend has none.
    """

    loss: Tensor
    grads: dict[int, Tensor]

    def plus(self, other: Partial) -> Partial:
        """The sum, in the memory of this one's gradients."""
        for at, grad in other.grads.items():
            self.grads[at] = self.grads[at].add_(grad) if at in self.grads else grad
        return Partial(self.loss + other.loss, self.grads)


def backward(
    tensors: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    indices: Tensor,
    micro_batch: int,
    grad_clip: float,
    share: Callable[[Sequence[Tensor]], None] = lambda wanted: None,
) -> float | None:
    """Set the tensors' gradients to those of a step's mean loss; the loss, or ``None`` if one of them is not finite.

    Args:
        tensors: leaf tensors that require gradients.
        loss: the mean loss over the sequences with the given indices.
        indices: the step's sequences.
        micro_batch: sequences that are computed together; 0: all.
        grad_clip: largest global norm of the gradients; 0: any.
        share: receives, in all processes at once, the indices that each of them computes next.
    """
    value = gradients(tensors, loss, indices.split(micro_batch or len(indices)), share)
    grads = [t.grad for t in tensors if t.grad is not None]
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    # One read of the device for both. A loss that is not finite costs its backward pass, and it is rare.
    found, size = torch.stack([value.double(), norm.double()]).tolist()
    if not (math.isfinite(found) and math.isfinite(size)):
        return None
    if grad_clip and size > grad_clip:
        torch._foreach_mul_(grads, grad_clip / norm)
    return float(found)


def gradients(
    tensors: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    micro_batches: Sequence[Tensor],
    share: Callable[[Sequence[Tensor]], None] = lambda wanted: None,
) -> Tensor:
    """Set the tensors' gradients to those of a step's mean loss, and return that loss.

    With one micro-batch every process computes it; of several each process computes some.

    Args:
        tensors: leaf tensors that require gradients.
        loss: the mean loss over the sequences with the given indices.
        micro_batches: indices of the step's sequences.
        share: receives, in all processes at once, the indices that each of them computes.

    >>> weight = torch.ones(1, requires_grad=True)
    >>> float(gradients([weight], lambda chosen: (weight * chosen).mean(), torch.tensor([1.0, 2.0, 6.0]).split(2)))
    3.0
    >>> weight.grad.tolist()
    [3.0]
    """
    if len(micro_batches) == 1:
        share([micro_batches[0]] * here().size)
        return _of(tensors, loss, micro_batches, len(micro_batches[0])).loss
    sequences = sum(map(len, micro_batches))
    parts, size = leaves(len(micro_batches)), here().size
    tree = Tree(Partial.plus)
    owned = [own_part(len(parts), rank, size) for rank in range(size)]
    share([_indices([micro_batches[at] for leaf in own for at in parts[leaf]]) for own in owned])
    for number in owned[here().rank]:
        own = [micro_batches[at] for at in parts[number]]
        tree.add(Node(number, 1, _of(tensors, loss, own, sequences)))
    whole = total(tree, _packed, _unpacked)
    assert whole is not None, "a step has no sequences"
    for at, tensor in enumerate(tensors):
        tensor.grad = whole.grads.get(at)
    return whole.loss


def _indices(micro_batches: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(micro_batches)) if micro_batches else torch.empty(0, dtype=torch.int64)


def _of(
    tensors: Sequence[Tensor], loss: Callable[[Tensor], Tensor], micro_batches: Sequence[Tensor], sequences: int
) -> Partial:
    """Of some micro-batches of a step with a number of sequences, added up one after the other."""
    for tensor in tensors:
        tensor.grad = None
    sums: list[Tensor] = []
    for chosen in micro_batches:
        value = loss(chosen)
        if len(chosen) != sequences:
            value = value * (len(chosen) / sequences)
        value.backward()
        sums.append(value.detach())
    grads = {at: tensor.grad for at, tensor in enumerate(tensors) if tensor.grad is not None}
    return Partial(sum(sums[1:], sums[0]), grads)


def _packed(one: Partial) -> tuple[Any, list[Tensor]]:
    return list(one.grads), [one.loss, *one.grads.values()]


def _unpacked(numbers: Any, tensors: list[Tensor]) -> Partial:
    return Partial(tensors[0], dict(zip(numbers, tensors[1:], strict=True)))
