"""Is an exported file what the run evaluated? Every value, bit for bit, through the format's own reader.

What is compared is the float32 value of every parameter, rounded or not, by its bits (so that -0 is not 0 and NaN is
found), and beside them metadata, config and tokenizer. A file that its reader cannot read has failed, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowbit.errors import LowbitError
from lowbit.export.run import Run
from lowbit.export.target import Exporter

NAMED = 5


@dataclass(frozen=True)
class Verified:
    """What comparing one export with its run gave.

    Attributes:
        path: the export.
        target: its format.
        tensors: how many parameters were compared; ``exact``: how many are equal bit for bit.
        max_difference: the largest absolute difference of a value, in the value's own unit.
        differs: names of parameters that differ, are missing, or are there and should not be.
        other: what else differs: metadata keys, file names.
        unreadable: why the format's reader gave up, or ``None``.
    """

    path: str
    target: str
    tensors: int = 0
    exact: int = 0
    max_difference: float = 0.0
    differs: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    unreadable: str | None = None

    @property
    def ok(self) -> bool:
        """Nothing differs."""
        return not (self.differs or self.other or self.unreadable)


def verify_one(run: Run, path: Path, target: str, exporter: Exporter) -> Verified:
    """Compare one export with the run that it claims to hold."""
    names = {*run.floats, *(f"{module}.weight" for module in run.rounded)}
    differs, seen, worst = [], set(), 0.0
    try:
        for name, got in exporter.read(run, path):
            seen.add(name)
            try:
                wanted = exporter.expect(run, name)
            except (LowbitError, KeyError):
                differs.append(name)
                continue
            if wanted.shape != got.shape:
                differs.append(name)
            elif not torch.equal(got.contiguous().view(torch.int32), wanted.contiguous().view(torch.int32)):
                differs.append(name)
                gap = (got.double() - wanted.double()).abs().nan_to_num(nan=torch.inf)
                worst = max(worst, float(gap.max()))
        other = list(exporter.other(run, path))
    except Exception as error:  # readers check little and trip over broken bytes in many ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return Verified(str(path), target, len(seen), len(seen) - len(differs), worst, differs, [], reason)
    differs += sorted(names - seen)
    count = len(seen | names)
    return Verified(str(path), target, count, count - len(differs), worst, differs, other)
