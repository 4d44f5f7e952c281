"""The public functions: what may be given by position, and that no more may."""

from __future__ import annotations

import inspect

import pytest

import lowbit
from lowbit.pipeline.inspect import inspect_model

POSITIONAL = {
    lowbit.quantize: ["model", "out"],
    lowbit.evaluate: ["model", "data"],
    lowbit.compare: ["exact", "runs"],
    lowbit.export: ["folder", "to"],
    lowbit.verify: ["folder", "files"],
    lowbit.diagnose: ["run"],
    lowbit.fit: ["model", "out"],
    lowbit.frontier: ["model", "out"],
    lowbit.imatrix: ["model", "out"],
    lowbit.evaluate_tasks: ["model", "tasks"],
    lowbit.report: ["folders"],
    lowbit.load: ["folder"],
    lowbit.merge: ["adapter"],
    inspect_model: ["model", "scheme", "recipe"],
}


@pytest.mark.parametrize("function", POSITIONAL, ids=lambda function: function.__name__)
def test_options_are_given_by_name(function):
    """A call such as ``quantize(m, out, 4, 16)`` says nothing, and would break when an option is added."""
    parameters = inspect.signature(function).parameters.values()
    by_position = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert by_position == POSITIONAL[function]
    assert {parameter.kind for parameter in parameters} <= {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }


def test_every_public_function_with_options_is_in_the_list():
    functions = [getattr(lowbit, name) for name in lowbit.__all__ if inspect.isfunction(getattr(lowbit, name))]
    several = {function for function in functions if len(inspect.signature(function).parameters) > 1}
    assert several <= set(POSITIONAL)
