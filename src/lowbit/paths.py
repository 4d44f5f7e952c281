"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from lowbit.errors import LowbitError


def user_path(given: str | Path) -> Path:
    """A path with a leading ``~`` expanded; shells leave it alone in ``--out=~/x`` and in quotes.

    Raises:
        LowbitError: ``~`` of a user that this machine does not know, or without a home folder.

    >>> user_path("runs/a").as_posix()
    'runs/a'
    """
    text = os.fspath(given)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        home = Path(text).parts[0]
        raise LowbitError(f"{text} given; '{home}' is no home folder known here: give the whole path") from error
