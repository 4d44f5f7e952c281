"""Which texts a model is measured on by default, and whether their kinds were calibrated on."""

from __future__ import annotations

from collections.abc import Iterable

from lowbit.data.builtin import BUILTIN, unseen_kind
from lowbit.data.hub import HUB
from lowbit.runs.manifest import Calibration

KNOWN = frozenset(BUILTIN) | {text.kind for text in HUB.values()}


def default_texts(calibrations: Iterable[Calibration]) -> tuple[str, str]:
    """Wikipedia, and a kind of text that none of the runs was calibrated on.

    Args:
        calibrations: of the runs that are measured; none for a float model.

    >>> default_texts([])
    ('builtin:wiki', 'builtin:multilingual')
    """
    kinds = {kind for calibration in calibrations for kind in calibration.kinds}
    return "builtin:wiki", f"builtin:{unseen_kind(kinds)}"


def calibrated_on(kind: str, calibration: Calibration | None) -> bool | None:
    """Whether a run was calibrated on a kind of text; ``None`` if that is not known.

    A file may hold any kind of text, also one with the name of a file that was calibrated on. After calibration on a
    file, no kind but those that were drawn beside it is known.

    >>> drawn = Calibration("builtin:wiki+c4", 32, 512, "auto", "", "0f", {"wiki": 16, "c4": 16})
    >>> calibrated_on("c4", drawn), calibrated_on("code", drawn), calibrated_on("code", None)
    (True, False, None)
    """
    if kind not in KNOWN or calibration is None or not calibration.kinds:
        return None
    if kind in calibration.kinds:
        return True
    return False if KNOWN.issuperset(calibration.kinds) else None
