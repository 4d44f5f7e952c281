"""What every number format promises, over all of ``FORMATS``: a new one is tested by being listed."""

from __future__ import annotations

import pytest

from contracts import check_format
from lowbit.quant.formats import FORMATS

CASES = [format for kind in FORMATS.values() for format in kind.examples()]


@pytest.mark.parametrize("format", CASES, ids=lambda format: format.name)
def test_a_format_keeps_the_contract(format):
    check_format(format)


def test_every_kind_has_examples():
    assert all(kind.examples() for kind in FORMATS.values())
