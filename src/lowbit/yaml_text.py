"""YAML text as plain data."""

from __future__ import annotations

from typing import Any

import yaml

from lowbit.errors import LowbitError, one_line


def parse_yaml(text: str, what: str) -> Any:
    """Plain data from YAML, without tags that make objects.

    Args:
        text: the content.
        what: its name at the start of an error, such as ``recipe my.yaml``.

    Raises:
        LowbitError: it is not YAML; dates that do not exist and thousands of nested brackets are none either.

    >>> parse_yaml("damping: 0.05", "recipe")
    {'damping': 0.05}
    >>> parse_yaml("2020-13-45", "recipe")
    Traceback (most recent call last):
    lowbit.errors.LowbitError: recipe is not valid YAML: month must be in 1..12
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LowbitError(f"{what} is not valid YAML: {one_line(error)}") from error
