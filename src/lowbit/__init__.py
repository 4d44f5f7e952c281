"""Make large language models small enough for phones, laptops and single GPUs, and keep them good.

>>> import lowbit
>>> lowbit.parse_scheme("w4a16g64-sym").weight.bits
4

Names are loaded when they are first used (PEP 562): ``lowbit --help`` need not wait for torch and transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.api import Evaluated, Quantized, evaluate, quantize
    from lowbit.comparing import Compared, compare
    from lowbit.diagnosing import Diagnosis, diagnose
    from lowbit.errors import LowbitError
    from lowbit.export.verify import Verified
    from lowbit.exporting import Exported, export, verify
    from lowbit.loading import load
    from lowbit.quant import Grid, QTensor, QuantSpec
    from lowbit.recipe import Recipe, load_recipe
    from lowbit.reporting import Reported, report
    from lowbit.scheme import Scheme, parse_scheme
    from lowbit.tasking import TaskScores, evaluate_tasks

__all__ = [
    "Compared",
    "Diagnosis",
    "Evaluated",
    "Exported",
    "Grid",
    "LowbitError",
    "QTensor",
    "QuantSpec",
    "Quantized",
    "Recipe",
    "Reported",
    "Scheme",
    "TaskScores",
    "Verified",
    "compare",
    "diagnose",
    "evaluate",
    "evaluate_tasks",
    "export",
    "load",
    "load_recipe",
    "parse_scheme",
    "quantize",
    "report",
    "verify",
]

_MODULES = {
    "api": ("Evaluated", "Quantized", "evaluate", "quantize"),
    "comparing": ("Compared", "compare"),
    "diagnosing": ("Diagnosis", "diagnose"),
    "errors": ("LowbitError",),
    "export.verify": ("Verified",),
    "exporting": ("Exported", "export", "verify"),
    "loading": ("load",),
    "quant": ("Grid", "QTensor", "QuantSpec"),
    "recipe": ("Recipe", "load_recipe"),
    "reporting": ("Reported", "report"),
    "scheme": ("Scheme", "parse_scheme"),
    "tasking": ("TaskScores", "evaluate_tasks"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


class _Package(ModuleType):
    """Python sets a submodule on its package when it is imported; ``lowbit.evaluate`` stays the function even so."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a type checker shall still see that lowbit.quantise does not exist

    def __getattr__(name: str) -> Any:
        """A public name, or a submodule such as ``lowbit.data``."""
        if name in _HOME:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        module = f"{__name__}.{name}"
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
