"""Finished tiny runs, each made once: exporters only read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import quantized


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
