"""The one exception that reaches a user as a line of text.

Every mistake that a person can make (a wrong name, a broken file, a full disk) raises ``LowbitError`` with
a message that says what was given, what is allowed and what to do. The command line prints that line and
exits with code 2; anything else that is raised is a bug in ``lowbit`` and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowbitError(Exception):
    """A mistake outside of ``lowbit``, told in one line: what was given, what is allowed, what to do."""


class MissingExtra(LowbitError):
    """An optional package is needed and not installed; the message carries the install line."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the package '{package}': pip install 'lowbit[{extra}]'")


def check_least(name: str, given: int, least: int, advice: str) -> None:
    """Refuse a whole number that is too small: what is given, what is allowed, what to do.

    >>> check_least("--samples", 0, 1, "give the number of calibration windows")
    Traceback (most recent call last):
    lowbit.errors.LowbitError: --samples 0 given; it must be 1 or more: give the number of calibration windows
    """
    if given < least:
        raise LowbitError(f"{name} {given} given; it must be {least} or more: {advice}")


def check_seed(seed: int) -> None:
    """Refuse a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise LowbitError(f"--seed {seed} given; it must be 0 or more and below 2**63: choose another number")


def unknown(kind: str, given: str, known: Iterable[str]) -> LowbitError:
    """An error for a name that is not known: suggests the nearest one and lists all.

    >>> str(unknown("recipe", "gtpq", ["rtn", "gptq"]))
    "unknown recipe 'gtpq': did you mean 'gptq'? Known: gptq, rtn"
    >>> str(unknown("field of rtn", "bits", []))
    "unknown field of rtn 'bits': there is none to set"
    """
    names = sorted(known)
    if not names:
        return LowbitError(f"unknown {kind} '{given}': there is none to set")
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" did you mean '{near[0]}'?" if near else ""
    return LowbitError(f"unknown {kind} '{given}':{hint} Known: {', '.join(names)}")
