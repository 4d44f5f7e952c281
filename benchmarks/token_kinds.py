"""What a token of a text is: letters of a script, a part of a character, digits or signs."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

UNDECODED = "\ufffd"
LONGEST = 8  # tokens of one character at most: UTF-8 takes four bytes, and a token may hold the end of another


def script(text: str) -> str:
    """The script of the first letter, or ``digits`` or ``signs`` where there is none.

    >>> script(" the"), script("Привет"), script("漢"), script("42."), script(", ")
    ('Latin', 'Cyrillic', 'CJK', 'digits', 'signs')
    """
    for character in text:
        if character.isalpha():
            name = unicodedata.name(character, "UNNAMED").partition(" ")[0].partition("-")[0]
            return name if name == "CJK" else name.capitalize()
    return "digits" if any(character.isdigit() for character in text) else "signs"


def without_rare(labels: Sequence[str], least: int) -> list[str]:
    """Labels that occur fewer than ``least`` times become ``others``.

    >>> without_rare(["a", "b", "a"], 2)
    ['a', 'others', 'a']
    """
    count = Counter(labels)
    return [label if count[label] >= least else "others" for label in labels]


def kinds_of_tokens(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The kind of each token of a window: a script, ``digits`` or ``signs``; parts of characters say so.

    Tokens that hold no whole character are taken together with those behind them until they are one, and have the
    script of that character: the Chinese U+6F22 in three tokens is three times ``CJK, bytes``.

    Args:
        ids: of the window.
        decode: ids to text; what is no whole character becomes U+FFFD.

    >>> decode = lambda ids: bytes(ids).decode("utf-8", "replace")
    >>> kinds_of_tokens(list("a漢".encode()), decode)
    ['Latin', 'CJK, bytes', 'CJK, bytes', 'CJK, bytes']
    """
    kinds: list[str] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = decode(pending)
        if UNDECODED in text and len(pending) < LONGEST:
            continue
        found = "bytes" if UNDECODED in text else script(text)
        kinds += [f"{found}, bytes" if len(pending) > 1 and found != "bytes" else found] * len(pending)
        pending = []
    return kinds + ["bytes"] * len(pending)
