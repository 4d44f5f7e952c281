"""The one training loop: every learned method hands ``fit`` its tensors and its loss.

Choices:

* The optimiser is AdamW without weight decay, as the papers take it; see ``adam.py``.
* The parameters that count are those with the least loss on sequences that were not trained on.
* A loss or gradient that is not finite never reaches a parameter: the step is skipped, the parameters go back to the
  best so far, the learning rate is halved, and the result says so.
* A fit that takes long keeps its state on disk after each epoch, and one that starts again goes on from there with
  the same bits: everything that the next step depends on is in the file, or follows from the schedule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoints.safetensors_folder import Checkpoint, write_tensors
from lowbit.methods.adam import Adam
from lowbit.methods.options import check_bounds, check_choices
from lowbit.models.offload import batches

PATIENCE = 8  # steps in a row that were not finite before the fit gives up


@dataclass(frozen=True)
class Schedule:
    """How long and how a fit runs.

    Attributes:
        epochs: passes over the training sequences; 0 leaves everything at its start.
        batch: sequences in a step.
        held_out: share of the sequences that only validates; 0 keeps the last epoch instead of the best.
        grad_clip: largest norm of all gradients together; 0 leaves them alone.
        decay: ``none`` for a constant learning rate, ``cosine`` to let it fall to a tenth.
    """

    epochs: int = 20
    batch: int = 1
    held_out: float = 0.125
    grad_clip: float = 0.0
    decay: str = "cosine"

    def __post_init__(self) -> None:
        bounds = {
            "epochs": "0 or more",
            "batch": "1 or more",
            "grad_clip": "0 or more",
            "held_out": "from 0 to below 1",
        }
        check_bounds("schedule", self, bounds)
        check_choices("schedule", self, {"decay": ("none", "cosine")})

    def scaled(self, share: float) -> Schedule:
        """The same with a share of the epochs; one that learns at all keeps at least one.

        >>> Schedule(20).scaled(0.3).epochs, Schedule(1).scaled(0.3).epochs, Schedule(0).scaled(0.3).epochs
        (6, 1, 0)
        """
        return replace(self, epochs=math.ceil(self.epochs * share))

    def split(self, sequences: int) -> tuple[Tensor, Tensor]:
        """Indices of the training sequences and of the held-out ones; with one sequence nothing is held out.

        The draw depends on their number alone: all blocks and steps of a run hold out the same ones. Were each to
        draw its own, a later step would be judged by sequences that earlier ones have learned from: the start, which
        fits those, then looks better than what is learned, and nothing is kept.

        >>> train, held = Schedule(1, held_out=0.25).split(8)
        >>> len(train), len(held)
        (6, 2)
        """
        order = torch.randperm(sequences, generator=torch.Generator().manual_seed(0))
        count = min(max(1, round(self.held_out * sequences)), sequences - 1) if self.held_out else 0
        return order[count:].sort().values, order[:count].sort().values

    def rate(self, step: int, steps: int) -> float:
        """The factor on the learning rates at ``step`` of ``steps``.

        >>> Schedule(1).rate(0, 10), Schedule(1, decay="none").rate(9, 10)
        (1.0, 1.0)
        """
        if self.decay == "none":
            return 1.0
        return 0.1 + 0.45 * (1 + math.cos(math.pi * step / max(steps, 1)))


@dataclass
class Fitted:
    """What happened.

    Attributes:
        train: mean loss of each epoch's steps.
        held_out: loss on the held-out sequences: before the first epoch and after each.
        best: the epoch whose parameters were kept; 0 is the start.
        skipped: steps that were left out because something was not finite.
        notes: what a reader of the report must know.
    """

    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)


def loss_unit(wanted: Tensor, loss: str, device: torch.device | None = None, batch: int = 4) -> Tensor:
    """What errors are measured in: the mean square of ``wanted`` ``(sequences, length, hidden)``, as ``(.., .., 1)``.

    ``token``: of each token for itself. ``mse``: of all tokens together, so that the largest decide. With ``device``
    it is made there, ``batch`` sequences at a time where ``wanted`` lives elsewhere.

    >>> loss_unit(torch.tensor([[[1.0, 1.0], [3.0, 3.0]]]), "token").flatten().tolist()
    [1.0, 9.0]
    >>> loss_unit(torch.tensor([[[1.0, 1.0], [3.0, 3.0]]]), "mse").flatten().tolist()
    [5.0, 5.0]
    """
    if device is None or device.type == wanted.device.type:
        batch = len(wanted)
    pieces = batches(wanted, batch, device or wanted.device)
    power = torch.cat([piece.float().square().mean(-1, keepdim=True).clamp(min=1e-12) for piece in pieces])
    return power if loss == "token" else power.double().mean().float().expand_as(power)


def relative_loss(got: Tensor, wanted: Tensor, unit: Tensor) -> Tensor:
    """The mean over tokens of the squared error in units of ``unit``, in float32 or better."""
    exact = got if got.dtype == torch.float64 else got.float()
    return ((exact - wanted).square().mean(-1, keepdim=True) / unit).mean()


def fit(
    groups: Sequence[tuple[Sequence[Tensor], float]],
    loss: Callable[[Tensor], Tensor],
    sequences: int,
    schedule: Schedule,
    seed: int = 0,
    begin: Callable[[int], None] = lambda epoch: None,
    project: Callable[[], None] = lambda: None,
    keep: Path | None = None,
    ahead: Callable[[Tensor], None] = lambda chosen: None,
) -> Fitted:
    """Train the tensors of ``groups`` in place and leave them at their best.

    Args:
        groups: leaf tensors that require gradients, with their learning rates.
        loss: the mean loss over the sequences with the given indices; differentiable in the tensors.
        sequences: how many sequences there are.
        schedule: epochs, batches, what is held out.
        seed: draws the order of the sequences that are not held out.
        begin: called with the epoch (1, 2, ...) before it starts, for masks that open; with the best one at the end.
        project: called after each step, without gradients, for constraints.
        keep: file for the state after each epoch. If it is there, of this same fit, the fit goes on from it.
        ahead: prefetch hook: receives the next batch's indices, once for each loss but the first.
    """
    tensors = [t for ts, _ in groups for t in ts]
    train, held = schedule.split(sequences)
    batches, looked = _batches(train, schedule, seed), list(held.split(max(schedule.batch, 4))) if len(held) else []
    adam = Adam(groups)
    state = _State([t.detach().clone() for t in tensors])
    fitted = state.fitted
    if keep is not None and keep.exists():
        _load(keep, state, tensors, adam)
    else:
        state.least = _mean_loss(loss, looked, ahead, batches[0][:1] if tensors and batches else [])
        fitted.held_out.append(state.least)
    if not tensors or not schedule.epochs:
        return fitted
    per_epoch = len(batches[0])
    steps = schedule.epochs * per_epoch
    for epoch in range(state.epoch + 1, schedule.epochs + 1):
        begin(epoch)
        losses = []
        following = batches[epoch][:1] if epoch < schedule.epochs else []
        order = _with_prefetch(batches[epoch - 1], looked[:1] or following, ahead)
        for step, chosen in enumerate(order, (epoch - 1) * per_epoch):
            value = _backward(tensors, loss, chosen, schedule.grad_clip)
            if value is None:
                fitted.skipped, state.failures, state.factor = (
                    fitted.skipped + 1,
                    state.failures + 1,
                    state.factor / 2,
                )
                _restore(tensors, state.best)
            else:
                losses.append(value)
                adam.step(state.factor * schedule.rate(step, steps))
                with torch.no_grad():
                    project()
                state.failures = 0
            if state.failures >= PATIENCE:
                break
        if losses:
            fitted.train.append(sum(losses) / len(losses))
        state.epoch = epoch
        if state.failures >= PATIENCE:
            fitted.notes.append(f"gave up in epoch {epoch}: {PATIENCE} steps in a row were not finite")
            state.epoch = schedule.epochs
        else:
            now = _mean_loss(loss, looked, ahead, following)
            fitted.held_out.append(now)
            if not looked or now < state.least or (math.isfinite(now) and not math.isfinite(state.least)):
                state.best, state.least, fitted.best = [t.detach().clone() for t in tensors], now, epoch
        if keep is not None:
            _save(keep, state, tensors, adam)
        if state.failures >= PATIENCE:
            break
    _restore(tensors, state.best)
    begin(fitted.best)
    if fitted.skipped:
        fitted.notes.append(
            f"{fitted.skipped} of {steps} steps were not finite: skipped, learning rate halved each time, "
            f"back to the parameters of epoch {fitted.best}"
        )
    return fitted


def _batches(train: Tensor, schedule: Schedule, seed: int) -> list[list[Tensor]]:
    """The indices of every step, by epoch."""
    generator = torch.Generator().manual_seed(seed)
    orders = (train[torch.randperm(len(train), generator=generator)] for _ in range(schedule.epochs))
    return [list(order.split(schedule.batch)) for order in orders]


def _with_prefetch(
    steps: Sequence[Tensor], following: Sequence[Tensor], ahead: Callable[[Tensor], None]
) -> Iterator[Tensor]:
    """``steps`` in turn, each after ``ahead`` was told of the one behind it; behind the last come ``following``."""
    for at, chosen in enumerate(steps):
        for then in [*steps[at + 1 : at + 2], *following][:1]:
            ahead(then)
        yield chosen


@dataclass
class _State:
    """What a fit is at between two epochs, beside its tensors and Adam's moments."""

    best: list[Tensor]
    least: float = math.nan
    epoch: int = 0
    factor: float = 1.0
    failures: int = 0
    fitted: Fitted = field(default_factory=Fitted)


def _save(path: Path, state: _State, tensors: Sequence[Tensor], adam: Adam) -> None:
    """Everything that the next epoch depends on, in one file."""
    facts = asdict(state.fitted) | {name: getattr(state, name) for name in ("least", "epoch", "factor", "failures")}
    content = {"facts": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}
    for at, (tensor, best, (_, _, *moments)) in enumerate(zip(tensors, state.best, adam.entries, strict=True)):
        parts = zip(("now", "best", "mean", "square", "count"), (tensor, best, *moments), strict=True)
        content |= {f"{at}.{name}": value.detach().cpu() for name, value in parts}
    write_tensors(path, content)


@torch.no_grad()
def _load(path: Path, state: _State, tensors: Sequence[Tensor], adam: Adam) -> None:
    """The inverse of ``_save``, into tensors that are there already."""
    kept = Checkpoint(path.parent, [path.name])
    facts = json.loads(bytes(kept.read(["facts"])["facts"].tolist()))
    for at, (tensor, best, (_, _, *moments)) in enumerate(zip(tensors, state.best, adam.entries, strict=True)):
        for name, into in zip(("now", "best", "mean", "square", "count"), (tensor, best, *moments), strict=True):
            into.copy_(kept.read([f"{at}.{name}"])[f"{at}.{name}"])
    for name in ("least", "epoch", "factor", "failures"):
        setattr(state, name, facts[name])
    for name in asdict(state.fitted):
        setattr(state.fitted, name, facts[name])


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _backward(
    tensors: Sequence[Tensor], loss: Callable[[Tensor], Tensor], chosen: Tensor, grad_clip: float
) -> float | None:
    """Gradients for the chosen sequences; the loss, or ``None`` if it or a gradient is not finite."""
    for tensor in tensors:
        tensor.grad = None
    value = loss(chosen)
    if not bool(torch.isfinite(value)):
        return None
    value.backward()
    grads = [t.grad for t in tensors if t.grad is not None]
    norm = torch.stack([g.norm() for g in grads]).norm()
    if not bool(torch.isfinite(norm)):
        return None
    if grad_clip and float(norm) > grad_clip:
        for grad in grads:
            grad.mul_(grad_clip / norm)
    return float(value.detach())


@torch.no_grad()
def _mean_loss(
    loss: Callable[[Tensor], Tensor],
    looked: Sequence[Tensor],
    ahead: Callable[[Tensor], None],
    following: Sequence[Tensor],
) -> float:
    """The mean loss over held-out sequences, in parts; NaN if there are none."""
    means = [(len(part), float(loss(part))) for part in _with_prefetch(looked, following, ahead)]
    return sum(count * value for count, value in means) / sum(map(len, looked)) if means else math.nan
