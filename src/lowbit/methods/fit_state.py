"""The state of a fit between two steps: what is trained, the best so far, and what a resumed fit depends on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.writing import write_tensors
from lowbit.methods.optimizer import Optimizer

FACTS = ("least", "epoch", "factor", "failures")


@dataclass
class Fitted:
    """Result of a fit.

    Attributes:
        train: mean training loss of each epoch.
        held_out: validation loss before the first epoch and after each.
        best: the epoch whose parameters are kept; 0 is the starting point.
        skipped: steps skipped because of a non-finite loss or gradient.
        notes: messages for the report.
    """

    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class FitState:
    """Parameters and moments now and at the best epoch, and counters.

    Attributes:
        optimizer: with the trained tensors.
        best: for each tensor its value at the best epoch, then its moments there.
        least: validation loss at the best epoch; NaN without a validation split.
        epoch: epochs that are complete.
        factor: factor on the learning rates, halved at each skipped step.
        failures: consecutive skipped steps.
        fitted: the result so far.
    """

    optimizer: Optimizer
    best: list[tuple[Tensor, ...]] = field(default_factory=list)
    least: float = math.nan
    epoch: int = 0
    factor: float = 1.0
    failures: int = 0
    fitted: Fitted = field(default_factory=Fitted)

    def __post_init__(self) -> None:
        self.keep()

    def _now(self) -> list[tuple[Tensor, ...]]:
        return [(t, *own) for t, own in zip(self.optimizer.tensors, self.optimizer.moments, strict=True)]

    def keep(self) -> None:
        """Make the present parameters and moments the best."""
        self.best = [tuple(value.detach().clone() for value in values) for values in self._now()]

    @torch.no_grad()
    def restore(self) -> None:
        """Return to the best parameters, with the moments that led there.

        Moments of the steps since then point away from them: a gradient that was about to overflow would go on
        moving the parameters for a thousand steps.
        """
        for values, best in zip(self._now(), self.best, strict=True):
            for value, kept in zip(values, best, strict=True):
                value.copy_(kept)

    def save(self, path: Path) -> None:
        """Write everything that the next epoch depends on to one file."""
        facts = asdict(self.fitted) | {name: getattr(self, name) for name in FACTS}
        content = {"facts": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}
        content |= {name: value.detach().cpu() for name, value in self._named().items()}
        write_tensors(path, content)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Read what ``save`` wrote, into the existing tensors."""
        checkpoint = Checkpoint(path.parent, [path.name])
        facts = json.loads(bytes(checkpoint.read(["facts"])["facts"].tolist()))
        for name, value in self._named().items():
            value.copy_(checkpoint.read([name])[name])
        self.optimizer.counted()
        for name in FACTS:
            setattr(self, name, facts[name])
        for name in asdict(self.fitted):
            setattr(self.fitted, name, facts[name])

    def _named(self) -> dict[str, Tensor]:
        fields = [("value", *own._fields) for own in self.optimizer.moments]
        return {
            f"{index}.{when}.{name}": value
            for when, parts in (("now", self._now()), ("best", self.best))
            for index, values in enumerate(parts)
            for name, value in zip(fields[index], values, strict=True)
        }
