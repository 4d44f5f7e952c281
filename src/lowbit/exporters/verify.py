"""Compares an export with its run, every value bit for bit, through the format's own reader.

The float32 values of all parameters, quantized or not, are compared by their bits (so that -0 differs from 0 and NaN
is detected), then metadata, config and tokenizer. A file that its reader cannot read fails, too. Where the target's
runtime is installed, its logits are compared with the simulation's as well.
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
# On a loaded machine logits of MatMulNBits may be off by 2e-4 in one pass and right in the next; the reason is not
# known. The file is right if a pass is; a file that is wrong is wrong in each.
PASSES = 2
# The simulation's logits by ``Executed.runtime`` and pass.
Simulated = Callable[[str | None, int], Tensor]


@dataclass(frozen=True)
class Verified:
    """The result of comparing one export with its run.

    Attributes:
        path: the export.
        target: its format.
        tensors: how many parameters were compared; ``exact``: how many are equal bit for bit.
        max_difference: the largest absolute difference of a value, in the value's own unit.
        differs: names of parameters that differ, are missing or are superfluous.
        other: anything else that differs: metadata keys, file names.
        unreadable: why the format's reader, or its runtime, failed, or ``None``.
        logits: relative error of the runtime's logits, see ``relative_error``; ``None`` if nothing was run.
        explained: how much of it the runtime's documented arithmetic explains.
        passes: how often the runtime computed; more than once where the first logits were not explained.
        faults: installed libraries that load the run folder wrongly, each with what to do instead.
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
    passes: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing differs beyond what the format documents, and no installed library reads it wrongly."""
        differs = self.differs or self.other or self.unreadable or self.faults
        return not differs and self.computes_the_same

    @property
    def computes_the_same(self) -> bool:
        """Whether the runtime's logits, if any, are within what its arithmetic explains."""
        return self.logits is None or self.explained is None or self.logits <= self.explained


def verify_one(run: Run, path: Path, target: str, exporter: Exporter) -> Verified:
    """Compare one export with its run."""
    names = {*run.floats, *run.inputs, *run.op_tensors, *(f"{module}.weight" for module in run.quantized)}
    differs, seen, worst = [], set(), 0.0
    try:
        for name, value in exporter.read(run, path):
            seen.add(name)
            try:
                expected = exporter.expect(run, name)
            except (LowbitError, KeyError):
                differs.append(name)
                continue
            if expected.shape != value.shape:
                differs.append(name)
            elif not torch.equal(value.contiguous().view(torch.int32), expected.contiguous().view(torch.int32)):
                differs.append(name)
                gap = (value.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
                worst = max(worst, float(gap.max()))
        other = list(exporter.other(run, path))
    except Exception as error:  # readers validate little and fail on broken bytes in many ways
        return Verified(str(path), target, len(seen), len(seen) - len(differs), worst, differs, [], _line(error))
    differs += sorted(names - seen)
    count = len(seen | names)
    return Verified(str(path), target, count, count - len(differs), worst, differs, other)


def run_one(result: Verified, exporter: Exporter, ids: Tensor, simulated: Simulated) -> Verified:
    """Add the comparison of logits in the target's runtime, if it is installed.

    Args:
        result: of comparing values; an export that failed there is not run.
        exporter: the target.
        ids: token ids ``(tokens,)``.
        simulated: computes the simulation's logits for them, ``(tokens, vocabulary)``, anew in each pass.
    """
    if not result.ok:
        return result
    for passes in range(1, PASSES + 1):
        try:
            executed = exporter.execute(Path(result.path), ids)
        except Exception as error:  # runtimes raise exceptions of their own
            return replace(result, unreadable=f"error in its runtime: {_line(error)}")
        if executed is None:
            return result
        gap = relative_error(executed.logits, simulated(executed.runtime, passes)[: len(executed.logits)])
        found = replace(result, logits=gap, explained=executed.explained, passes=passes)
        if found.computes_the_same:
            break
    return found


def relative_error(logits: Tensor, simulated: Tensor) -> float:
    """Root-mean-square distance of logits from the simulation's, in units of the latter's spread.

    Adding a constant to a token's logits changes nothing, so each token's mean is subtracted first.

    >>> relative_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]]))
    0.0
    >>> relative_error(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 2.0]]))
    0.5
    """
    ours, theirs = (x.double() - x.double().mean(-1, keepdim=True) for x in (simulated, logits))
    return float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
