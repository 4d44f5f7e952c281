"""User errors: exceptions that the command line prints as one line.

Every error that a user can cause or fix (a wrong name, a broken file, a full disk) raises ``LowbitError`` with a
message that states the value, what is allowed and what to do. The command line prints that line and exits with code
2; any other exception is a bug in ``lowbit`` and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 60  # characters of a value from a file in a message


class LowbitError(Exception):
    """A user error, described in one line: the value, what is allowed, what to do."""


class MissingExtra(LowbitError):
    """A required optional package is not installed; the message has the install command."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the package '{package}': pip install 'lowbit[{extra}]'")


def shown(value: object) -> str:
    """A value from a file as it can stand in a message: one printable line of limited length.

    >>> shown("two\\nlines"), shown([1, "x"])
    ("'two\\\\nlines'", "[1, 'x']")
    """
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def check_least(name: str, value: int, least: int, advice: str) -> None:
    """Raise ``LowbitError`` if an integer is below its minimum.

    >>> check_least("--samples", 0, 1, "give the number of calibration windows")
    Traceback (most recent call last):
    lowbit.errors.LowbitError: --samples 0 given; it must be 1 or more: give the number of calibration windows
    """
    if value < least:
        raise LowbitError(f"{name} {value} given; it must be {least} or more: {advice}")


def check_seed(seed: int) -> None:
    """Raise ``LowbitError`` for a seed that torch's generators do not accept."""
    if not 0 <= seed < 2**63:
        raise LowbitError(f"--seed {seed} given; it must be 0 or more and below 2**63: choose another number")


def canonical(kind: str, name: str, known: Iterable[str]) -> str:
    """The known name that ``name`` spells, in its own spelling: upper and lower case do not matter.

    Raises:
        LowbitError: there is no such name.

    >>> canonical("recipe", "GPTQ", ["rtn", "gptq"]), canonical("runtime", "vLLM", ["vllm"])
    ('gptq', 'vllm')
    """
    names = list(known)
    if name in names:
        return name
    spelled = [other for other in names if other.casefold() == name.casefold()]
    if len(spelled) != 1:
        raise unknown(kind, name, names)
    return spelled[0]


def unknown(kind: str, name: str, known: Iterable[str]) -> LowbitError:
    """The error for an unknown name: suggests the nearest one and lists all.

    >>> str(unknown("recipe", "gtpq", ["rtn", "gptq"]))
    "unknown recipe 'gtpq': did you mean 'gptq'? Known: gptq, rtn"
    >>> str(unknown("field of rtn", "bits", []))
    "unknown field of rtn 'bits': there are none"
    """
    names = sorted(known)
    if not names:
        return LowbitError(f"unknown {kind} '{name}': there are none")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" did you mean '{near[0]}'?" if near else ""
    return LowbitError(f"unknown {kind} '{name}':{hint} Known: {', '.join(names)}")
