"""Numbers measured at two small sizes, carried to a model's own.

A row of a fused linear, a head count, a rotary width: at the small size it is 32, at the other small size 24, so it
is ``2 * head_dim`` and not ``hidden_size / 2``. Sizes come from the layer itself (parameter shapes, and numbers that
its modules keep) and from the config. The rows of an edge are first written as strides: ``q0*16 k0*16 v0*16 q1*16``
has for its keys the base 16, 16 rows one apart, and heads 48 apart; each of these numbers is carried alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations_with_replacement
from typing import Any

from torch import nn

from lowbit.errors import LowbitError
from lowbit.models.discovery.rotary import rotary_numbers


class Mismatch(LowbitError):
    """The two small sizes do not show the same layout, or no size explains a number."""


@dataclass(frozen=True)
class Strides:
    """``base + sum of i * stride`` for each axis ``(count, stride)``, the innermost first."""

    base: int
    axes: tuple[tuple[int, int], ...]

    def numbers(self) -> tuple[int, ...]:
        """All of them, the innermost axis fastest.

        >>> Strides(4, ((2, 1), (2, 10))).numbers()
        (4, 5, 14, 15)
        """
        found = [self.base]
        for count, stride in self.axes:
            found = [start + i * stride for i in range(count) for start in found]
        return tuple(found)


def strides_of(numbers: Sequence[int]) -> Strides:
    """The fewest axes that give the numbers.

    >>> strides_of((4, 5, 14, 15))
    Strides(base=4, axes=((2, 1), (2, 10)))
    """
    if len(numbers) == 1:
        return Strides(numbers[0], ())
    step = numbers[1] - numbers[0]
    longest = next((i for i in range(1, len(numbers)) if numbers[i] - numbers[i - 1] != step), len(numbers))
    for count in range(longest, 1, -1):
        blocks = [numbers[i : i + count] for i in range(0, len(numbers), count)]
        if all(list(block) == [block[0] + i * step for i in range(count)] for block in blocks):
            outer = strides_of([block[0] for block in blocks])
            return Strides(outer.base, ((count, step), *outer.axes))
    raise Mismatch(f"{len(numbers)} channels in no regular order")


@dataclass(frozen=True)
class Measure:
    """A number by name at the two small sizes and at the real one."""

    small: int
    other: int
    real: int


@dataclass(frozen=True)
class Sizes:
    """The numbers that a layout may be made of.

    Attributes:
        near: those of the edge itself; they are tried first.
        far: those of the layer and of the config.
    """

    near: Mapping[str, Measure] = field(default_factory=dict)
    far: Mapping[str, Measure] = field(default_factory=dict)

    def with_near(self, **measures: tuple[int, int, int]) -> Sizes:
        """With more numbers of the edge."""
        return Sizes({**self.near, **{name: Measure(*values) for name, values in measures.items()}}, self.far)

    def carry(self, small: int, other: int) -> int:
        """The real value of a number that was measured at both small sizes.

        Equal values are a constant. Otherwise it is a size, a sum, difference or product of two, or a rational
        multiple of one, in this order; sizes of the edge go first. Of several explanations most must agree.

        Raises:
            Mismatch: nothing explains both values.

        >>> sizes = Sizes({"dim": Measure(16, 8, 128), "heads": Measure(4, 12, 32)})
        >>> sizes.carry(16, 8), sizes.carry(64, 96), sizes.carry(4, 2), sizes.carry(1, 1)
        (128, 4096, 32, 1)
        """
        if small == other:
            return small
        for measures in (list(self.near.values()), list(self.far.values())):
            for explain in (_equal, _pairs, _multiples):
                votes = Counter(explain(measures, small, other))
                if votes:
                    return votes.most_common(1)[0][0]
        raise Mismatch(f"no size of the layer explains {small} and {other}")

    def carry_all(self, small: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
        """The real numbers of two lists of the same layout."""
        one, two = strides_of(small), strides_of(other)
        axes_one, axes_two = list(one.axes), list(two.axes)
        if len(axes_one) != len(axes_two):
            raise Mismatch("the two small sizes have different layouts")
        axes = [(self.carry(a, b), self.carry(da, db)) for (a, da), (b, db) in zip(axes_one, axes_two, strict=True)]
        return Strides(self.carry(one.base, two.base), tuple(axes)).numbers()


def _equal(measures: Sequence[Measure], small: int, other: int) -> Iterator[int]:
    return (one.real for one in measures if (one.small, one.other) == (small, other))


def _pairs(measures: Sequence[Measure], small: int, other: int) -> Iterator[int]:
    for x, y in combinations_with_replacement(dict.fromkeys(measures), 2):
        if (x.small * y.small, x.other * y.other) == (small, other):
            yield x.real * y.real
        if (x.small + y.small, x.other + y.other) == (small, other):
            yield x.real + y.real
        for a, b in ((x, y), (y, x)):
            if (a.small - b.small, a.other - b.other) == (small, other):
                yield a.real - b.real
            if (small * b.small, other * b.other) == (a.small, a.other) and b.real and a.real % b.real == 0:
                yield a.real // b.real


def _multiples(measures: Sequence[Measure], small: int, other: int) -> Iterator[int]:
    for one in measures:
        if one.small * other == one.other * small:
            value = Fraction(small, one.small) * one.real
            if value.denominator == 1:
                yield int(value)


def numbers_of(layer: nn.Module, config: Any) -> dict[str, int]:
    """Every size that a layer and a config know, by name; ones and zeros say nothing."""
    found: dict[str, int] = {}
    for name, module in layer.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_"):
                found[f"{name}.{key}"] = value
        for key, parameter in module.named_parameters(recurse=False):
            found |= {f"{name}.{key}.{axis}": size for axis, size in enumerate(parameter.shape)}
    fields = config.to_dict()
    found |= {f"config.{key}": value for key, value in _flat(fields)}
    found |= dict(rotary_numbers(fields))
    whole = {key: value for key, value in found.items() if isinstance(value, int) and not isinstance(value, bool)}
    return {key: value for key, value in whole.items() if value > 1 and not key.endswith(("_token_id", "layer_idx"))}


def _flat(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in _flat(value))
        else:
            yield key, value


def measures(small: Mapping[str, int], other: Mapping[str, int], real: Mapping[str, int]) -> dict[str, Measure]:
    """The numbers that all three have."""
    return {name: Measure(small[name], other[name], real[name]) for name in small if name in other and name in real}
