"""Finished tiny runs, each made once, since exporters only read them; and what a run would be, without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import LowbitError
from lowbit.exporters import exporter_of
from lowbit.exporters.fit import check
from lowbit.pipeline.recipe import load_recipe
from lowbit.pipeline.target import subject_of
from lowbit.quant.scheme_names import parse_scheme, with_overrides
from lowbit.runs.plan import make_plan
from tiny import quantized, skeleton_of, tiny_model


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny model's run, by what ``tiny.quantized`` takes; whoever exports it names ``out``."""
    made: dict[str, Path] = {}

    def make(scheme: str | None, family: str = "llama", recipe: str = "rtn", **more: Any) -> Path:
        key = repr((scheme, family, recipe, sorted(more.items())))
        if key not in made:
            made[key] = quantized(tmp_path_factory.mktemp("made"), scheme, family, recipe, **more)
        return made[key]

    return make


@pytest.fixture(scope="session")
def refusal_of() -> Callable[..., str]:
    """The one line with which a target refuses a scheme for a tiny model; nothing is quantized for it."""

    def refused(target: str, scheme: str, family: str = "llama", overrides: dict[str, str] | None = None) -> str:
        skeleton = skeleton_of(tiny_model(family))
        parsed = with_overrides(parse_scheme(scheme), overrides or {})
        subject = subject_of(make_plan(skeleton, parsed), parsed, load_recipe("rtn"), skeleton)
        with pytest.raises(LowbitError) as caught:
            check(target, exporter_of(target).misfit, subject)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused
