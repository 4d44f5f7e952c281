"""Progress in a log: nothing for short work, then a line now and then; the clock is a fake."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lowbit import progress


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress, "clock", made)
    monkeypatch.setattr(progress, "_printed", -1e9)
    return made


@pytest.fixture
def log(monkeypatch):
    """What is written to standard error where that is no terminal."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=False))
    return file


def spend(clock: Clock, seconds: float, items, description: str = "quantizing", total: int | None = None) -> list:
    done = []
    for item in progress.track(items, description, total):
        clock.now += seconds
        done.append(item)
    return done


def test_short_work_prints_nothing(clock, log):
    assert spend(clock, 1.4, range(10)) == list(range(10))
    assert spend(clock, 1.4, range(10)) == list(range(10))
    assert log.getvalue() == ""


def test_long_work_says_how_far_it_is_after_15_s_and_then_every_30_s(clock, log):
    assert spend(clock, 5, range(24)) == list(range(24))
    assert log.getvalue().splitlines() == [
        "quantizing: 3 of 24 (12 %), about 2 min left",  # at 15 s
        "quantizing: 9 of 24 (38 %), about 75 s left",  # at 45 s
        "quantizing: 15 of 24 (62 %), about 45 s left",
        "quantizing: 21 of 24 (88 %), about 15 s left",
    ]


def test_items_that_take_long_are_a_line_each_and_the_last_is_none(clock, log):
    spend(clock, 200, range(3), "blocks")
    assert log.getvalue().splitlines() == [
        "blocks: 1 of 3 (33 %), about 7 min left",
        "blocks: 2 of 3 (67 %), about 3 min left",
    ]


def test_steps_in_a_row_share_the_30_s(clock, log):
    for name in ("one", "two", "three"):
        spend(clock, 4, range(5), name)  # 20 s each: due at 16 s of each
    assert log.getvalue().splitlines() == [
        "one: 4 of 5 (80 %), about 4 s left",
        "three: 4 of 5 (80 %), about 4 s left",
    ]


def test_a_total_that_is_not_known_is_left_out(clock, log):
    spend(clock, 20, iter(range(2)), "reading")
    assert log.getvalue().splitlines() == ["reading: 1 done in 20 s"]
    spend(clock, 40, iter(range(2)), "reading", total=2)
    assert log.getvalue().splitlines()[1:] == ["reading: 1 of 2 (50 %), about 40 s left"]


def test_a_terminal_gets_a_bar_and_no_lines(clock, monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=True, width=100))
    assert spend(clock, 60, range(3)) == [0, 1, 2]
    assert "━" in file.getvalue()
    assert "about" not in file.getvalue()
