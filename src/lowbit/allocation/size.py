"""Sizes as users write them: ``90MB``, ``1.8 GiB``, ``500000``."""

from __future__ import annotations

import re

from lowbit.errors import LowbitError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def bytes_in(text: str, option: str = "--size") -> int:
    """The bytes of a size that was given as ``option``.

    >>> bytes_in("90MB"), bytes_in("1.5 GiB"), bytes_in("4096")
    (90000000, 1610612736, 4096)
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in UNITS:
        raise LowbitError(f"{option} {text} given; give a number with kB, MB, GB, KiB, MiB or GiB, such as 90MB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def megabytes(size: int) -> str:
    """A size that ``bytes_in`` reads and that holds at least ``size`` bytes.

    >>> megabytes(91_700_000), megabytes(91_700_001), megabytes(20_001)
    ('91.70MB', '91.71MB', '20.1kB')
    """
    if size < 10**6:
        return f"{-(-size // 100) / 10:.1f}kB"
    return f"{-(-size // 10**4) / 100:.2f}MB"
