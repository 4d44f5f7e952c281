"""What files say of their tensors, and tensors of a model that are parts of stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor: its shape, and its dtype as safetensors names it (``F16``, ``I32``)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredPart:
    """A matrix, or a vector, that is stored with others in one tensor.

    Attributes:
        stored: the tensor's name, of shape ``(count, ...)``.
        index: the place along its first dimension.
        rows: the rows there, or the entries of a vector.
        transposed: the matrices there are ``(in, out)``.
    """

    stored: str
    index: int
    rows: range | tuple[int, ...]
    transposed: bool

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape in a tensor of shape ``whole``; ``()`` where the tensor has no such part."""
        own = whole[1:][::-1] if self.transposed else whole[1:]
        fits = len(whole) in (2, 3) and self.index < whole[0] and all(row < own[0] for row in self.rows[-1:])
        return (len(self.rows), *own[1:]) if fits else ()

    def taken(self, whole: Any) -> Tensor:
        """The part of a tensor, or of a file's slice, of which no more than one index is read."""
        value: Tensor = whole[self.index]
        value = value.mT if self.transposed and value.ndim == 2 else value
        rows = self.rows
        return value[rows.start : rows.stop] if isinstance(rows, range) else value[list(rows)]


@dataclass(frozen=True)
class StoredRows:
    """Rows of what is stored in several tensors, one behind another, or of one that holds several.

    Attributes:
        stored: the tensors' names; they differ in their first dimension only.
        start, stop: the rows among those of all of them.
        total: how many rows these have.
    """

    stored: tuple[str, ...]
    start: int
    stop: int
    total: int

    def shape(self, wholes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape in tensors of shapes ``wholes``; ``()`` where they have other rows.

        >>> StoredRows(("q", "k"), 0, 12, 12).shape([(8, 1, 4), (4, 1, 4)])
        (12, 1, 4)
        """
        fits = all(wholes) and len({whole[1:] for whole in wholes}) == 1
        fits = fits and sum(whole[0] for whole in wholes) == self.total
        return (self.stop - self.start, *wholes[0][1:]) if fits else ()
