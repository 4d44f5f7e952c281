"""What a model calls its decoder layers with, for any number of sequences.

Two passes, with one sequence and with two, show which dimension of each tensor counts sequences: the one that
doubled. It is not always the first (streams may be stacked before it), and a mask may carry heads with it.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.models.discovery.small_model import SmallModel, token_ids


@dataclass(frozen=True)
class Call:
    """The arguments of one layer for one sequence, and those for two.

    Attributes:
        args, kwargs: for one sequence.
        doubled: both, for two sequences.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    doubled: tuple[tuple[Any, ...], Mapping[str, Any]]

    def redrawn(self, seed: int) -> Call:
        """The call with random hidden states: tokens of a model resemble each other, and hide dead channels."""
        generator = torch.Generator().manual_seed(seed)

        def noise(hidden: Tensor) -> Tensor:
            scale = hidden.square().mean().sqrt()
            return scale * torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)

        at = next((i for i, one in enumerate(self.args) if isinstance(one, Tensor) and one.is_floating_point()), None)
        if at is not None:
            return replace(self, args=(*self.args[:at], noise(self.args[at]), *self.args[at + 1 :]))
        if isinstance(self.kwargs.get("hidden_states"), Tensor):
            return replace(self, kwargs={**self.kwargs, "hidden_states": noise(self.kwargs["hidden_states"])})
        return self

    def arguments(self, sequences: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the sequence repeated; containers are new, since a layer may write into them."""

        def repeat(one: Tensor, two: Tensor) -> Tensor:
            axis = sequence_axis(one.shape, two.shape)
            return one if axis is None else torch.cat([one] * sequences, axis)

        args = tuple(paired(one, two, repeat) for one, two in zip(self.args, self.doubled[0], strict=True))
        kwargs = {name: paired(one, self.doubled[1][name], repeat) for name, one in self.kwargs.items()}
        return args, kwargs


def sequence_axis(one: torch.Size, two: torch.Size) -> int | None:
    """The dimension that doubled; ``None`` if none did.

    >>> sequence_axis(torch.Size([4, 1, 18]), torch.Size([8, 1, 18]))
    0
    """
    return next((axis for axis, (a, b) in enumerate(zip(one, two, strict=False)) if b == 2 * a and a), None)


def paired(one: Any, two: Any, change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A structure with its tensors changed, given the tensors of a structure of the same form."""
    if isinstance(one, Tensor):
        return change(one, two) if isinstance(two, Tensor) else one
    if isinstance(one, tuple) and hasattr(one, "_fields"):
        return type(one)(*(paired(a, b, change) for a, b in zip(one, two, strict=True)))
    if isinstance(one, tuple | list):
        return type(one)(paired(a, b, change) for a, b in zip(one, two, strict=True))
    if isinstance(one, dict | UserDict):
        out = copy.copy(one)
        for key in one:
            out[key] = paired(one[key], two[key], change)
        return out
    return one


def _copied(value: Any) -> Any:
    """A structure with containers of its own: later layers write into those that they are handed."""
    return paired(value, value, lambda one, two: one)


def capture(small: SmallModel) -> list[Call]:
    """The first call of every layer of a small model.

    Raises:
        LowbitError: a layer is not called.
    """
    return first_calls(small.model, small.layers, token_ids)


@torch.no_grad()
def first_calls(model: Any, layers: Sequence[nn.Module], ids: Callable[[int], Tensor]) -> list[Call]:
    """The first call of every layer; ``ids`` gives token ids for a number of sequences.

    Raises:
        LowbitError: a layer is not called.
    """
    one, two = (_recorded(model, layers, ids(sequences)) for sequences in (1, 2))
    missing = [index for index, _ in enumerate(layers) if index not in one or index not in two]
    if missing:
        raise LowbitError(
            f"decoder layer {missing[0]} of {type(model).__name__} is not called for a text alone: choose another "
            "model"
        )
    return [Call(*one[index], doubled=two[index]) for index in range(len(layers))]


def _recorded(
    model: Any, layers: Sequence[nn.Module], ids: Tensor
) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index not in found:  # a model may loop over its layers
                found[index] = (_copied(args), _copied(kwargs))

        return hook

    handles = [layer.register_forward_pre_hook(record(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def output_of(value: Any) -> Tensor:
    """The hidden states in what a layer returns: the first floating tensor."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list):
        return next(output_of(one) for one in value if isinstance(one, Tensor | tuple | list))
    raise LowbitError(f"a decoder layer returns a {type(value).__name__}, no tensor")
