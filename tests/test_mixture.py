"""The order in which kinds of text are drawn, and where their windows lie: properties for every number of windows."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch

from lowbit.data.builtin import MIXTURE
from lowbit.data.mixture import HELD_OUT, arranged, held_count, held_out_kind, turns, validation_order
from lowbit.methods.training import Schedule

SHARES = {"mixture": list(MIXTURE.values()), "two": [Fraction(1, 2)] * 2, "five": [Fraction(1, 5)] * 5}


def kinds_of(shares: list[Fraction], n: int) -> list[str]:
    return ["abcde"[i] for i in turns(shares, n)]


@pytest.mark.parametrize("name", SHARES)
def test_every_kind_has_its_share_at_all_times(name):
    shares, order = SHARES[name], turns(SHARES[name], 200)
    for n in range(1, 201):
        counts = Counter(order[:n])
        assert all(abs(counts[i] - share * n) < 1 for i, share in enumerate(shares))


def test_a_share_of_nothing_is_never_drawn():
    assert turns([Fraction(0), Fraction(1)], 3) == [1, 1, 1]


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("share", [HELD_OUT, 0.25, 0.5])
def test_validation_takes_the_kind_that_is_left_out_and_then_all_in_turn(name, share):
    """For every number of windows and every share: the kind as far as it goes, then the others as they are drawn."""
    for n in range(2, 70):
        kinds = kinds_of(SHARES[name], n)
        held_out = held_out_kind(kinds, seed=1)
        placed = arranged(kinds, held_out)
        assert sorted(placed) == list(range(n))
        _, held = Schedule(held_out=share).split(n)
        found = Counter(kinds[placed[i]] for i in held)
        whole = [window for window in range(n) if kinds[window] == held_out]
        others = [window for window in range(n) if kinds[window] != held_out]
        assert found == Counter(kinds[window] for window in (whole + others)[: len(held)])
        if held_out is not None:
            assert found[held_out] == len(whole) <= held_count(n)


@pytest.mark.parametrize("name", ["two", "five"])
def test_large_kinds_are_not_left_out(name):
    """Beyond a few windows each kind is a half or a fifth of them, and validation an eighth."""
    assert all(held_out_kind(kinds_of(SHARES[name], n), 0) is None for n in range(16, 70))


def test_seeds_leave_out_kinds_in_turn():
    kinds = kinds_of(SHARES["mixture"], 32)
    assert [held_out_kind(kinds, seed) for seed in range(4)] == ["c", "d", "c", "d"]


def test_one_kind_stays_in_the_order_of_the_draw():
    for n in (1, 2, 9):
        assert arranged(["a"] * n, None) == list(range(n))
        assert held_out_kind(["a"] * n, 0) is None
    assert held_out_kind(["a", "b"], 0) == "a"  # of two windows, one is validation


def test_the_order_of_validation_depends_on_the_number_alone():
    for n in (1, 2, 32):
        torch.manual_seed(n)
        first = validation_order(n)
        torch.manual_seed(n + 1)
        assert validation_order(n).equal(first)
        assert sorted(first.tolist()) == list(range(n))
    assert [held_count(n) for n in (1, 2, 3, 12, 100)] == [0, 1, 1, 2, 12]
    assert held_count(2, 0.9) == 1  # one is left to train on
