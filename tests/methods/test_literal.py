"""Methods against literal computations, and wrong variants that these must tell apart."""

from __future__ import annotations

from unittest import mock

import pytest
from literal import LITERAL
from mutants import PATCHES


@pytest.mark.parametrize("name", LITERAL)
def test_a_method_is_what_a_literal_computation_gives(name):
    LITERAL[name]()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.why)
def test_a_wrong_part_is_told_apart(patch):
    with mock.patch.object(patch.owner, patch.attribute, patch.wrong), pytest.raises(AssertionError):
        LITERAL[patch.fails]()


def test_every_literal_check_has_a_wrong_part_that_fails_it():
    assert {patch.fails for patch in PATCHES} == set(LITERAL)
