"""Every example in a docstring of the package does what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import lowbit
from lowbit.errors import MissingExtra

MODULES = ["lowbit", *(m.name for m in pkgutil.walk_packages(lowbit.__path__, "lowbit."))]


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_docstring_examples(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lowbit"):
            raise
        pytest.skip(f"needs the optional package {error.name}")
    except MissingExtra as error:
        pytest.skip(str(error))
    result = doctest.testmod(module)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples fail; see above"


def test_there_are_examples_where_people_look_first():
    finder = doctest.DocTestFinder()
    for name in (
        "lowbit.errors",
        "lowbit.quant.format",
        "lowbit.quant.integer",
        "lowbit.quant.activations",
        "lowbit.quant.scheme_names",
        "lowbit.models.architecture",
        "lowbit.models.runtime_ops",
        "lowbit.methods.smoothquant",
    ):
        assert any(test.examples for test in finder.find(importlib.import_module(name))), f"{name} has no example"
