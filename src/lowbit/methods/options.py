"""A step's options by name: flat for people (``affinequant.epochs``), grouped in the code (``schedule.epochs``)."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from lowbit.errors import unknown

Step = TypeVar("Step")


def options_of(step: Any) -> dict[str, Any]:
    """Every option of a step with its value, those of groups beside the others, in the order of their declaration.

    >>> from lowbit.methods.lowrank import LowRank
    >>> options_of(LowRank())["epochs"]
    20
    """
    return {name: getattr(owner, name) for owner, name in _owners(step)}


def option_types(step: Any) -> dict[str, Any]:
    """The type of every option."""
    return {name: typing.get_type_hints(type(owner))[name] for owner, name in _owners(step)}


def with_options(step: Step, **values: Any) -> Step:
    """The step with some options set, wherever they are grouped.

    Raises:
        LowbitError: it has no option of a name, or refuses a value.

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


def check_choices(step: str, options: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse an option with a value that is not among its choices."""
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise unknown(f"{step}.{name}", getattr(options, name), allowed)
