"""JSON files of models, which anyone may have written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, one_line

DEEPEST = 100  # lists and objects of a JSON file within each other; those of models have less than ten


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ``LowbitError`` for anything else, and for one that nests too deeply."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not UTF-8, no JSON, or an integer of thousands of digits
        raise LowbitError(f"cannot read {path}: {one_line(error)}") from error
    except RecursionError as error:
        raise _too_deep(path) from error
    if not isinstance(content, dict):
        raise LowbitError(f"{path} does not hold a JSON object")
    if _nests_deeper(content, DEEPEST):
        raise _too_deep(path)
    return content


def _nests_deeper(content: Any, limit: int) -> bool:
    """Whether lists and objects are within each other more than ``limit`` times.

    >>> _nests_deeper({"a": [1]}, 2), _nests_deeper({"a": [[]]}, 2)
    (False, True)
    """
    level = [content]
    for _ in range(limit):
        level = [inner for value in level for inner in _inner(value) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _inner(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _too_deep(path: Path) -> LowbitError:
    return LowbitError(f"{path} nests lists and objects more than {DEEPEST} deep: it is no file of a model's")
