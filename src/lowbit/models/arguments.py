"""The keyword arguments that a model gives its layers, recorded for one sequence and made for any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.models.stream import ids_of

ADVICE = "lowbit runs a model's layers one after the other, each with the arguments of one text: choose another model"
CLOSE = 1e-5  # of arguments: batched products round differently


@dataclass(frozen=True)
class PerSequence:
    """An argument that has rows for each sequence: ``value`` ``(rows, ...)`` is that of one sequence."""

    value: Tensor

    def for_batch(self, x: Tensor) -> Tensor:
        """``(sequences * rows, ...)`` for a stream ``x`` ``(sequences, length, width)``, in its dtype.

        >>> PerSequence(torch.tensor([1, 2])).for_batch(torch.zeros(2, 3, 4)).tolist()
        [1, 2, 1, 2]
        """
        value = self.value
        if len(value) == 1:
            rows = value.expand(len(x), *value.shape[1:])
        else:
            rows = value.repeat(len(x), *[1] * (value.ndim - 1))
        return rows.to(x.dtype) if rows.is_floating_point() else rows


@dataclass(frozen=True)
class PerText:
    """An argument that depends on the text: ``compute`` makes ``(sequences, ...)`` of ids ``(sequences, length)``."""

    compute: Callable[[Tensor], Tensor]

    def for_batch(self, x: Tensor, digits: Tensor) -> Tensor:
        """That of the sequences whose ids' digits are given, in the dtype of ``x``."""
        value = self.compute(ids_of(digits))
        return value.to(x.dtype) if value.is_floating_point() else value


def for_batch(arguments: Mapping[str, Any], x: Tensor, digits: Tensor) -> dict[str, Any]:
    """A layer's keyword arguments for a stream.

    Args:
        arguments: as recorded.
        x: ``(sequences, length, width)``.
        digits: of its token ids, see ``State``.
    """
    out = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, PerSequence):
            out[name] = value.for_batch(x)
        elif isinstance(value, PerText):
            out[name] = value.for_batch(x, digits)
    return out


def names_by_text(one: Mapping[str, Any], two: Mapping[str, Any], layer: int) -> tuple[set[str], set[str]]:
    """Names of the arguments of ``layer`` with rows for each sequence, not broadcast, and names of those of the text.

    Args:
        one: the arguments for a sequence.
        two: those for that sequence and another of the same length.
        layer: its index.

    Raises:
        LowbitError: an argument within a tuple or mapping depends on the text, or one does not have the sequences in
            front.
    """
    names, texts = set(), set()
    for name, value in one.items():
        pairs = list(zip(_tensors(value), _tensors(two.get(name)), strict=False))
        if isinstance(value, Tensor) and pairs and _is_of_text(*pairs[0]):
            texts.add(name)
            continue
        if any(not same(a, b) and not _doubled(a, b) for a, b in pairs):
            raise LowbitError(
                f"the model gives layer {layer} the argument '{name}', which depends on the text or does not have "
                f"the sequences in front: {ADVICE}"
            )
        if isinstance(value, Tensor) and any(not same(a, b) for a, b in pairs):
            names.add(name)
        elif any(not same(a, b) and len(a) > 1 for a, b in pairs):
            raise LowbitError(f"the argument '{name}' of layer {layer} holds tensors with sequences: {ADVICE}")
    return names, texts


def _is_of_text(one: Tensor, two: Tensor) -> bool:
    """Whether an argument has one row for each sequence, and another for another text."""
    fits = one.ndim > 0 and len(one) == 1 and len(two) == 2
    return fits and same(one, two[:1]) and one.shape == two[1:].shape and not same(one, two[1:])


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument: itself, or those in a tuple, list or mapping."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and, but for rounding, the same values."""
    if a.shape != b.shape:
        return False
    return torch.allclose(a, b, CLOSE, CLOSE, True) if a.is_floating_point() else torch.equal(a, b)


def _doubled(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` is ``a`` twice, one behind the other."""
    return a.ndim > 0 and len(b) == 2 * len(a) and same(a, b[: len(a)]) and same(a, b[len(a) :])
