"""Is an exported file what the run evaluated? Every value, bit for bit, through the format's own reader.

What is compared is the float32 value of every parameter, rounded or not, by its bits (so that -0 is not 0 and NaN is
found), and beside them metadata, config and tokenizer. A file that its reader cannot read has failed, too. Where the
target's runtime is installed, its logits are compared with the simulation's as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.exporters.run import Run
from lowbit.exporters.target import Exporter

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
        unreadable: why the format's reader, or its runtime, gave up, or ``None``.
        logits: relative error of the runtime's logits, see ``relative_error``; ``None`` if nothing was run.
        explained: how much of it the runtime's documented arithmetic explains.
    """

    path: str
    target: str
    tensors: int = 0
    exact: int = 0
    max_difference: float = 0.0
    differs: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    unreadable: str | None = None
    logits: float | None = None
    explained: float | None = None

    @property
    def ok(self) -> bool:
        """Nothing differs beyond what the format documents."""
        return not (self.differs or self.other or self.unreadable) and self.computes_the_same

    @property
    def computes_the_same(self) -> bool:
        """The runtime's logits, if there are any, are within what its arithmetic explains."""
        return self.logits is None or self.explained is None or self.logits <= self.explained


def verify_one(run: Run, path: Path, target: str, exporter: Exporter) -> Verified:
    """Compare one export with the run that it claims to hold."""
    names = {*run.floats, *(f"{module}.weight" for module in run.quantized)}
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
        return Verified(str(path), target, len(seen), len(seen) - len(differs), worst, differs, [], _line(error))
    differs += sorted(names - seen)
    count = len(seen | names)
    return Verified(str(path), target, count, count - len(differs), worst, differs, other)


def run_one(found: Verified, exporter: Exporter, ids: Tensor, simulated: Callable[[str | None], Tensor]) -> Verified:
    """The same result with the logits of the target's runtime, if it is installed.

    Args:
        found: what comparing values gave; an export that failed there is not run.
        exporter: the target.
        ids: token ids ``(tokens,)``.
        simulated: gives the simulation's logits for them, ``(tokens, vocabulary)``, for ``Executed.runtime``.
    """
    if not found.ok:
        return found
    try:
        executed = exporter.execute(Path(found.path), ids)
    except Exception as error:  # runtimes refuse a model with exceptions of their own
        return replace(found, unreadable=f"its runtime says: {_line(error)}")
    if executed is None:
        return found
    gap = relative_error(executed.logits, simulated(executed.runtime)[: len(executed.logits)])
    return replace(found, logits=gap, explained=executed.explained)


def relative_error(logits: Tensor, simulated: Tensor) -> float:
    """How far logits are from the simulation's, root mean square, in units of the spread of the latter.

    A token's logits mean the same when a constant is added, so each token's mean is taken off.

    >>> relative_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]]))
    0.0
    >>> relative_error(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 2.0]]))
    0.5
    """
    ours, theirs = (x.double() - x.double().mean(-1, keepdim=True) for x in (simulated, logits))
    return float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
