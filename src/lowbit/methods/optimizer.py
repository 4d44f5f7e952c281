"""What the training loop asks of an optimizer: ``adam.py`` and ``sign_descent.py`` are its implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

Groups = Sequence[tuple[Sequence[Tensor], float]]


class Optimizer(Protocol):
    """An optimizer of ``(tensors, learning rate)`` groups, whose whole state is in ``moments``.

    Attributes:
        tensors: all tensors, in the order of the groups.
        moments: for each tensor a named tuple of tensors, which a fit saves and restores with it.
    """

    tensors: list[Tensor]

    @property
    def moments(self) -> Sequence[Any]:
        """For each tensor a named tuple of tensors."""

    def counted(self) -> None:
        """Take note of moments that were written from outside, by a fit that is resumed."""

    def step(self, factor: float) -> None:
        """One update from the tensors' gradients, with learning rates times ``factor``."""


OptimizerOf = Callable[[Groups], Optimizer]
