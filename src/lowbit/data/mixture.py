"""In which order the windows of several kinds of text are drawn, and which of them learned steps validate on.

A learned step keeps the epoch that is best on its validation split. A split of the kinds that it trains on says how
well it fits those kinds; which epoch is best on other text, only other text can say. So where a kind is small
enough, **one kind is left out of training as a whole** and is the validation split.

What may be left out is bounded: by default validation takes ``HELD_OUT`` of the windows, and training on fewer costs
more than a better validation split gains. A kind with more windows than that is not left out; of several that fit,
the seed chooses, so that runs with other seeds leave out others. Where none fits, as with two texts of equal shares,
validation takes its share **of every kind in turn**. Rejected there: a share of one kind alone, whose other windows
train: it would choose the epoch for that kind, and say no more about other text; and leaving a large kind out, which
keeps a text that was given for calibration from being trained on.

All blocks and steps of a run share one split, and a step knows the number of sequences, nothing else. The split is
therefore by position, in the order of ``validation_order``, and ``arranged`` puts the windows in their positions. A
step with another share than ``HELD_OUT`` takes the kind that is left out first as well: a part of it, or all of it
and then the other kinds in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

HELD_OUT = 0.125  # the share of sequences that validation takes by default


def turns(shares: Sequence[Fraction], n: int) -> list[int]:
    """Which of several texts gives each of ``n`` windows: always the one that is furthest behind its share.

    Args:
        shares: of the windows, one for each text; their sum is 1. Equal shares take turns.
        n: number of windows.

    >>> turns([Fraction(1, 2), Fraction(1, 4), Fraction(1, 8), Fraction(1, 8)], 8)
    [0, 1, 0, 2, 3, 0, 1, 0]
    >>> turns([Fraction(1, 3)] * 3, 5)
    [0, 1, 2, 0, 1]
    """
    given = [0] * len(shares)
    order = []
    for window in range(1, n + 1):
        behind = [share * window - count for share, count in zip(shares, given, strict=True)]
        chosen = behind.index(max(behind))
        given[chosen] += 1
        order.append(chosen)
    return order


def held_count(sequences: int, share: float = HELD_OUT) -> int:
    """Number of sequences in the validation split: at least one and not all, or none with a share of 0.

    >>> [held_count(n) for n in (1, 2, 8, 32)], held_count(32, 0.0)
    ([0, 1, 1, 4], 0)
    """
    return min(max(1, round(share * sequences)), sequences - 1) if share else 0


def validation_order(sequences: int) -> Tensor:
    """Positions ``(sequences,)`` in the order in which validation takes them; depends on their number alone."""
    return torch.randperm(sequences, generator=torch.Generator().manual_seed(0))


def held_out_kind(kinds: Sequence[str], seed: int) -> str | None:
    """The kind that validation takes as a whole, chosen by ``seed``; ``None`` if all are too large, or there is one.

    Args:
        kinds: of each window.
        seed: of the run.

    >>> kinds = ["wiki", "c4", "wiki", "code", "multilingual", "wiki", "c4", "wiki"]
    >>> held_out_kind(kinds, 0), held_out_kind(kinds, 1), held_out_kind(["wiki", "c4"] * 4, 0)
    ('code', 'multilingual', None)
    """
    names = list(dict.fromkeys(kinds))
    small = [name for name in names if kinds.count(name) <= held_count(len(kinds))]
    return small[seed % len(small)] if small and len(names) > 1 else None


def arranged(kinds: Sequence[str], held_out: str | None) -> list[int]:
    """Which of the windows drawn is at each position: validation takes ``held_out`` first, then the kinds in turn.

    Windows that are all of one kind stay as drawn: they are alike.

    Args:
        kinds: of the windows in the order in which they are drawn, the kinds in turn.
        held_out: the kind that validation takes as a whole, if any.

    >>> kinds = ["wiki", "c4", "wiki", "code", "multilingual", "wiki", "c4", "wiki"]
    >>> [kinds[i] for i in arranged(kinds, "code")][int(validation_order(8)[0])]
    'code'
    """
    n = len(kinds)
    if len(set(kinds)) < 2:
        return list(range(n))
    taken = sorted(range(n), key=lambda window: kinds[window] != held_out)
    placed = [0] * n
    for position, window in zip(validation_order(n).tolist(), taken, strict=True):
        placed[position] = window
    return placed
