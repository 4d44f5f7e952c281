"""Make large language models small enough for phones, laptops and single GPUs, and keep them good.

>>> import lowbit
>>> lowbit.parse_scheme("w4a16g64-sym").weight.bits
4

Names are imported on first use (PEP 562), so ``lowbit --help`` does not wait for torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.allocation.api import Fitted, fit
    from lowbit.allocation.frontier_run import frontier
    from lowbit.analysis.diagnose import Diagnosis, diagnose
    from lowbit.errors import LowbitError
    from lowbit.evaluation.compare import Compared, compare
    from lowbit.evaluation.evaluate import Evaluated, evaluate
    from lowbit.evaluation.tasks import TaskScores, evaluate_tasks
    from lowbit.exporters.api import Exported, export, verify
    from lowbit.exporters.verify import Verified
    from lowbit.pipeline.imatrix import Imatrix, imatrix
    from lowbit.pipeline.merge import Merged, merge
    from lowbit.pipeline.quantize import Quantized, quantize
    from lowbit.pipeline.recipe import Recipe, load_recipe
    from lowbit.quant.format import Format, QParams, QTensor
    from lowbit.quant.integer import IntFormat
    from lowbit.quant.scheme import Scheme
    from lowbit.quant.scheme_names import parse_scheme
    from lowbit.reports.build import Reported, report
    from lowbit.runs.load import load

__all__ = [
    "Compared",
    "Diagnosis",
    "Evaluated",
    "Exported",
    "Fitted",
    "Format",
    "Imatrix",
    "IntFormat",
    "LowbitError",
    "Merged",
    "QParams",
    "QTensor",
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
    "fit",
    "frontier",
    "imatrix",
    "load",
    "load_recipe",
    "merge",
    "parse_scheme",
    "quantize",
    "report",
    "verify",
]

_MODULES = {
    "allocation.api": ("Fitted", "fit"),
    "allocation.frontier_run": ("frontier",),
    "analysis.diagnose": ("Diagnosis", "diagnose"),
    "errors": ("LowbitError",),
    "evaluation.compare": ("Compared", "compare"),
    "evaluation.evaluate": ("Evaluated", "evaluate"),
    "evaluation.tasks": ("TaskScores", "evaluate_tasks"),
    "exporters.api": ("Exported", "export", "verify"),
    "exporters.verify": ("Verified",),
    "pipeline.imatrix": ("Imatrix", "imatrix"),
    "pipeline.merge": ("Merged", "merge"),
    "pipeline.quantize": ("Quantized", "quantize"),
    "pipeline.recipe": ("Recipe", "load_recipe"),
    "quant.format": ("Format", "QParams", "QTensor"),
    "quant.integer": ("IntFormat",),
    "quant.scheme": ("Scheme",),
    "quant.scheme_names": ("parse_scheme",),
    "reports.build": ("Reported", "report"),
    "runs.load": ("load",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # type checkers still report unknown names

    def __getattr__(name: str) -> Any:
        """A public name, or a subpackage such as ``lowbit.data``."""
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
