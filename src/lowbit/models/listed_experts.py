"""Experts of a mixture that are modules of their own, as code of a model's own may have them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ListedExperts:
    """Experts that are modules of their own in a list, each called with the tokens that reach it.

    Their linears are ordinary ones for whoever loads the model; what they read is a part of the tokens.

    Attributes:
        module: the list's name within the layer: ``mlp.experts``.
        count: number of experts.
        own_groups: the linears of an expert, by name within it, grouped by shared input, in execution order.
    """

    module: str
    count: int
    own_groups: tuple[tuple[str, ...], ...]

    def expert(self, number: int) -> str:
        """An expert's module within the layer: ``mlp.experts.3``."""
        return f"{self.module}.{number}"

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """All experts' linears grouped by shared input: the first group of every expert, then the next of each."""
        numbers = range(self.count)
        return tuple(
            tuple(f"{self.expert(number)}.{name}" for name in own) for own in self.own_groups for number in numbers
        )

    def place(self, name: str) -> tuple[int, str] | None:
        """The expert and the linear within it that a name means; ``None`` for the name of anything else.

        >>> ListedExperts("mlp.experts", 8, (("w1", "w3"), ("w2",))).place("mlp.experts.3.w2")
        (3, 'w2')
        """
        number, _, own = name.removeprefix(f"{self.module}.").partition(".")
        known = any(own in group for group in self.own_groups)
        if not name.startswith(f"{self.module}.") or not number.isdecimal() or not known:
            return None
        return int(number), own
