"""User errors: exceptions that the command line prints as one line.

Every error that a user can cause or fix (a wrong name, a broken file, a full disk) raises ``LowbitError`` with a
message that states the value, what is allowed and what to do. The command line prints that line and exits with code
2; any other exception is a bug in ``lowbit`` and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 200  # characters of a name or a foreign error within a message


def printable(text: str) -> str:
    """Text as one line that a terminal shows as it is: what does not print is written as its escape.

    Names in a model's files may hold line breaks, control sequences and halves of characters.

    >>> print(printable("a\\nb\\x1b[31m"), printable("größe"))
    a\\nb\\x1b[31m größe
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shown(value: object) -> str:
    """A value from a file, for a message: its ``repr`` as one line of limited length.

    >>> print(shown("model\\n.safetensors"), shown("x" * 300)[-6:])
    'model\\n.safetensors' xxx...
    """
    try:
        text = printable(repr(value))
    except (RecursionError, ValueError):  # integers of thousands of digits have no repr
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def one_line(error: BaseException) -> str:
    """An error's message as one printable line of limited length."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


class LowbitError(Exception):
    """A user error, described in one printable line: the value, what is allowed, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class MissingExtra(LowbitError):
    """A required optional package is not installed; the message has the install command."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the package '{package}': pip install 'lowbit[{extra}]'")


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
