"""Versions of libraries that load a scheme wrongly without an error, and what to do instead.

Such a library gives a model that runs and computes something else, so no user would notice. ``verify`` names those
that are installed. A fault stays in the table until a version that is known to be right is released, which then is
its ``fixed``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from lowbit.exporters.run import Subject
from lowbit.quant.floating import NVFP4
from lowbit.quant.layouts import FP8


@dataclass(frozen=True)
class Fault:
    """What versions of one library make of some schemes.

    Attributes:
        package: the library, by the name under which it is installed.
        effect: what it does, after its name and version.
        remedy: what to do instead.
        applies: whether a subject has such a scheme.
        since: the first version that does it; ``None``: all before ``fixed``.
        fixed: the first version that does not; ``None``: none so far.
    """

    package: str
    effect: str
    remedy: str
    applies: Callable[[Subject], bool]
    since: str | None = None
    fixed: str | None = None

    def line(self, installed: str) -> str:
        """One line for the installed version."""
        return f"{self.package} {installed} {self.effect}: {self.remedy}"

    def has(self, installed: str) -> bool:
        """Whether a version has the fault.

        >>> fault = Fault("x", "", "", lambda subject: True, since="5.9", fixed="5.24.1")
        >>> [fault.has(version) for version in ("5.8.9", "5.9", "5.24.0", "5.24.1", "6")]
        [False, True, True, False, False]
        """
        own = _numbers(installed)
        late = self.since is None or own >= _numbers(self.since)
        return late and (self.fixed is None or own < _numbers(self.fixed))


def _numbers(text: str) -> list[int]:
    """The release of a version: ``5.24.0.dev0`` is ``[5, 24, 0]``."""
    return [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])]


def _kv(subject: Subject) -> bool:
    return subject.formats.kv is not None


def _nvfp4_experts(subject: Subject) -> bool:
    return any(format == NVFP4 and ".experts." in name for name, format in subject.weights.items())


def _fp8(subject: Subject) -> bool:
    return any(module.layout is FP8 for module in subject.formats.modules.values())


FAULTS = (
    Fault(
        "transformers",
        "runs a checkpoint with quantized keys and values with those in floating point, without an error",
        "load it with lowbit.load, or quantize with a scheme without kv",
        _kv,
    ),
    Fault(
        "transformers",
        "drops the scale of the tensor of experts in NVFP4, without an error",
        "load it with lowbit.load, or give experts another format, such as --override '*.experts.*=mxfp4'",
        _nvfp4_experts,
    ),
    Fault(
        "mlx-lm",
        "takes weights in FP8 for integers of 4 bits, without an error",
        "do not load this folder with it, or quantize with a scheme of integers, MXFP4 or NVFP4",
        _fp8,
    ),
)


def installed_faults(subject: Subject, packages: Sequence[str] = ("transformers", "mlx-lm")) -> list[str]:
    """One line for each fault that an installed library has for a subject.

    Args:
        subject: the run.
        packages: the libraries that count.
    """
    found = []
    for fault in FAULTS:
        if fault.package not in packages or not fault.applies(subject):
            continue
        try:
            installed = version(fault.package)
        except PackageNotFoundError:
            continue
        if fault.has(installed):
            found.append(fault.line(installed))
    return found
