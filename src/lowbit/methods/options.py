"""A step's options by name: flat in recipes (``affinequant.epochs``), grouped in code (``schedule.epochs``)."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from lowbit.errors import LowbitError, unknown

Step = TypeVar("Step")


def options_of(step: Any) -> dict[str, Any]:
    """Every option of a step with its value, groups flattened, in declaration order.

    >>> from lowbit.methods.lowrank import LowRank
    >>> options_of(LowRank())["epochs"]
    20
    """
    return {name: getattr(owner, name) for owner, name in _owners(step)}


def option_types(step: Any) -> dict[str, Any]:
    """The type of every option."""
    return {name: typing.get_type_hints(type(owner))[name] for owner, name in _owners(step)}


def with_options(step: Step, **values: Any) -> Step:
    """A copy of the step with the named options set, whatever their group.

    Raises:
        LowbitError: the step has no such option, or refuses a value.

    >>> from lowbit.methods.lowrank import LowRank
    >>> with_options(LowRank(), epochs=3).schedule.epochs
    3
    """
    known = options_of(step)
    for name in values:
        if name not in known:
            raise unknown(f"option of {type(step).__name__}", name, known)
    return _replaced(step, values)


def _replaced(owner: Any, values: Mapping[str, Any]) -> Any:
    changed: dict[str, Any] = {}
    for field in fields(owner):
        value = getattr(owner, field.name)
        if is_dataclass(value):
            changed[field.name] = _replaced(value, values)
        elif field.name in values:
            changed[field.name] = values[field.name]
    return replace(owner, **changed)


def _owners(step: Any) -> Iterator[tuple[Any, str]]:
    for field in fields(step):
        value = getattr(step, field.name)
        if is_dataclass(value):
            yield from _owners(value)
        else:
            yield step, field.name


BOUNDS: dict[str, Callable[[float], bool]] = {
    "1 or more": lambda value: value >= 1,
    "0 or more": lambda value: value >= 0,
    "above 0": lambda value: value > 0,
    "above 1": lambda value: value > 1,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "from 0 to below 1": lambda value: 0 <= value < 1,
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "above 0 and at most 0.5": lambda value: 0 < value <= 0.5,
}


def check_bounds(step: str, options: Any, bounds: Mapping[str, str]) -> None:
    """Refuse a number outside its bounds (keys of ``BOUNDS``).

    >>> from lowbit.methods.smoothquant import SmoothQuant
    >>> SmoothQuant(2.0)
    Traceback (most recent call last):
    lowbit.errors.LowbitError: smoothquant.alpha 2 given; it must be from 0 to 1
    """
    for name, allowed in bounds.items():
        value = getattr(options, name)
        if not BOUNDS[allowed](value):
            raise LowbitError(f"{step}.{name} {value:g} given; it must be {allowed}")


def check_choices(step: str, options: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse an option whose value is not among its choices."""
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise unknown(f"{step}.{name}", getattr(options, name), allowed)
