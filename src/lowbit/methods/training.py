"""The training loop of all learned methods: ``fit`` takes their tensors and loss.

Choices:

* The optimiser is AdamW without weight decay, as in the papers (``adam.py``), unless a method brings its own.
* The result has the parameters of the epoch with the lowest validation loss. With a validation split, a fit ends when
  ``Schedule.patience`` epochs in a row have not lowered it.
* A non-finite loss or gradient never reaches a parameter: the step is skipped, the best parameters are restored with
  the optimizer's moments of that time, the learning rate is halved, and a note records it.
* A long fit saves its state after each epoch and resumes bit for bit: the file and the schedule determine everything
  that the next step depends on.
* A step is the unit that one process computes, unless ``Schedule.micro_batch`` divides it: then gradients are summed
  over micro-batches in the order of ``distributed.tree``, whatever number of processes computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowbit.data.mixture import HELD_OUT, held_count, validation_order
from lowbit.distributed.exchange import by_first, from_everyone, from_first
from lowbit.distributed.tree import own_part
from lowbit.distributed.world import here
from lowbit.methods.adam import Adam
from lowbit.methods.fit_state import FitState, Fitted
from lowbit.methods.gradients import backward
from lowbit.methods.optimizer import OptimizerOf
from lowbit.methods.options import check_bounds, check_choices
from lowbit.models.offload import batches
from lowbit.models.shard import Shard, States, own_states

TRIES = 8  # consecutive non-finite steps that end the fit


@dataclass(frozen=True)
class Schedule:
    """Training schedule of a fit.

    Attributes:
        epochs: passes over the training split, or as many sequences of it as ``sequences`` says; 0 disables training.
        batch: sequences per step.
        held_out: share of the sequences in the validation split; with 0, the last epoch is kept, not the best.
        grad_clip: largest global gradient norm; 0 disables clipping.
        decay: ``none`` for a constant learning rate, ``cosine`` for a decay to a tenth, ``linear`` for one to 0.
        sequences: training sequences per epoch, the next of a random order of all, so that every one is used before
            any is used again; 0: all.
        patience: consecutive epochs without a lower validation loss that end the fit; 0: all epochs run.
        micro_batch: sequences of a step that are computed together; the processes of a job share a step's
            micro-batches. 0: all of a step, which is then computed by each process.
    """

    epochs: int = 20
    batch: int = 1
    held_out: float = HELD_OUT
    grad_clip: float = 0.0
    decay: str = "cosine"
    sequences: int = 0
    patience: int = 5
    micro_batch: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "epochs": "0 or more",
            "sequences": "0 or more",
            "patience": "0 or more",
            "micro_batch": "0 or more",
            "batch": "1 or more",
            "grad_clip": "0 or more",
            "held_out": "from 0 to below 1",
        }
        check_bounds("schedule", self, bounds)
        check_choices("schedule", self, {"decay": ("none", "cosine", "linear")})

    def steps(self, sequences: int) -> int:
        """Steps of all epochs, with a number of sequences to be split.

        >>> Schedule(3, batch=4).steps(16)  # 14 sequences are trained on
        12
        >>> Schedule(3, batch=4, sequences=7).steps(16)  # 7 of them in an epoch
        6
        """
        return self.epochs * -(-self.per_epoch(len(self.split(sequences)[0])) // self.batch)

    def scaled(self, share: float) -> Schedule:
        """The schedule with a share of its epochs, at least one unless it has none.

        >>> Schedule(20).scaled(0.3).epochs, Schedule(1).scaled(0.3).epochs, Schedule(0).scaled(0.3).epochs
        (6, 1, 0)
        """
        return replace(self, epochs=math.ceil(self.epochs * share))

    def split(self, sequences: int) -> tuple[Tensor, Tensor]:
        """Indices of the training and the validation split; with one sequence, the validation split is empty.

        The draw depends on the number of sequences alone, so that all blocks and steps of a run share one split. With
        a split of its own, a later step would validate on sequences that earlier steps were trained on; its starting
        point already fits those, and no epoch would improve on it. Which kind of text lies where it is drawn is for
        ``data.mixture`` to arrange: a kind that is left out of training, or a share of every kind.

        >>> train, held = Schedule(1, held_out=0.25).split(8)
        >>> len(train), len(held)
        (6, 2)
        """
        order, count = validation_order(sequences), held_count(sequences, self.held_out)
        return order[count:].sort().values, order[:count].sort().values

    def per_epoch(self, train: int) -> int:
        """Sequences that an epoch takes of ``train`` training sequences.

        >>> Schedule(sequences=28).per_epoch(112), Schedule(sequences=28).per_epoch(14), Schedule().per_epoch(14)
        (28, 14, 14)
        """
        return min(self.sequences, train) if self.sequences else train

    def rate(self, step: int, steps: int) -> float:
        """Factor on the learning rates at ``step`` of ``steps``.

        >>> Schedule(1).rate(0, 10), Schedule(1, decay="none").rate(9, 10), Schedule(1, decay="linear").rate(5, 10)
        (1.0, 1.0, 0.5)
        """
        if self.decay == "none":
            return 1.0
        if self.decay == "linear":
            return 1 - step / max(steps, 1)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * step / max(steps, 1)))


def loss_unit(target: States, loss: str, device: torch.device | None = None, batch: int = 4) -> Tensor:
    """The unit of errors: the mean square of ``target`` ``(sequences, length, hidden)``, as ``(.., .., 1)``.

    ``token``: per token. ``mse``: over all tokens, so that the largest dominate. ``batch`` sequences are processed at
    once; with ``device``, the result is there. Of a shard it is that of all sequences, in every process.

    >>> loss_unit(torch.tensor([[[1.0, 1.0], [3.0, 3.0]]]), "token").flatten().tolist()
    [1.0, 9.0]
    >>> loss_unit(torch.tensor([[[1.0, 1.0], [3.0, 3.0]]]), "mse").flatten().tolist()
    [5.0, 5.0]
    """
    own = own_states(target)
    parts = batches(own, batch, device or own.device)
    power = torch.cat([part.float().square().mean(-1, keepdim=True).clamp(min=1e-12) for part in parts])
    if isinstance(target, Shard):
        power = target.with_own(power).whole()
    return power if loss == "token" else power.double().mean().float().expand_as(power)


def relative_loss(output: Tensor, target: Tensor, unit: Tensor) -> Tensor:
    """The mean over tokens of the squared error in units of ``unit``, in float32 or float64."""
    exact = output if output.dtype == torch.float64 else output.float()
    return ((exact - target).square().mean(-1, keepdim=True) / unit).mean()


def fit(
    groups: Sequence[tuple[Sequence[Tensor], float]],
    loss: Callable[[Tensor], Tensor],
    sequences: int,
    schedule: Schedule,
    seed: int = 0,
    begin: Callable[[int], None] = lambda epoch: None,
    project: Callable[[], None] = lambda: None,
    end: Callable[[], None] = lambda: None,
    keep: Path | None = None,
    ahead: Callable[[Tensor], None] = lambda chosen: None,
    share: Callable[[Sequence[Tensor]], None] = lambda wanted: None,
    optimizer: OptimizerOf = Adam,
) -> Fitted:
    """Train the tensors of ``groups`` in place and leave them at the best epoch.

    Args:
        groups: leaf tensors that require gradients, with their learning rates.
        loss: the mean loss over the sequences with the given indices; differentiable in the tensors.
        sequences: number of sequences.
        schedule: epochs, batches, validation split.
        seed: of the order of the training sequences.
        begin: called with the epoch (1, 2, ...) before it starts, to set masks; at the end with the best epoch.
        project: called after each step, without gradients, to apply constraints.
        end: called after the steps of an epoch, without gradients, before its validation.
        keep: file for the state after each epoch. An existing file, which must be of the same fit, is resumed from.
        ahead: prefetch hook: receives the next batch's indices, once for each loss but the first.
        share: receives, in all processes at once, the indices of the next losses of each.
        optimizer: makes the optimizer of ``groups``.
    """
    train, held_out = schedule.split(sequences)
    minibatches = _batches(train, schedule, seed)
    validation = list(held_out.split(max(schedule.batch, 4))) if len(held_out) else []
    state = FitState(optimizer(groups))
    tensors, fitted = state.optimizer.tensors, state.fitted
    if keep is not None and from_first(keep.exists):
        state.load(keep)
    else:
        following = minibatches[0][:1] if tensors and minibatches else []
        state.least = _mean_loss(loss, validation, ahead, following, share)
        fitted.held_out.append(state.least)
    if not tensors or not schedule.epochs:
        return fitted
    steps = schedule.epochs * len(minibatches[0])
    for epoch in range(state.epoch + 1, schedule.epochs + 1):
        if validation and 0 < schedule.patience <= epoch - 1 - fitted.best:
            after = f"epoch {epoch - 1} of {schedule.epochs}"
            fitted.notes.append(
                f"stopped after {after}: {schedule.patience} in a row without a lower validation loss"
            )
            break
        begin(epoch)
        following = minibatches[epoch][:1] if epoch < schedule.epochs else []
        order = _with_prefetch(minibatches[epoch - 1], validation[:1] or following, ahead)
        _train(state, loss, order, schedule, (epoch - 1) * len(minibatches[0]), steps, project, share)
        state.epoch = epoch
        if state.failures >= TRIES:
            fitted.notes.append(f"stopped in epoch {epoch}: {TRIES} consecutive steps were not finite")
            state.epoch = schedule.epochs
        else:
            with torch.no_grad():
                end()
            now = _mean_loss(loss, validation, ahead, following, share)
            fitted.held_out.append(now)
            if not validation or now < state.least or (math.isfinite(now) and not math.isfinite(state.least)):
                state.least, fitted.best = now, epoch
                state.keep()
        if keep is not None:
            by_first(partial(state.save, keep))
        if state.failures >= TRIES:
            break
    state.restore()
    begin(fitted.best)
    if fitted.skipped:
        fitted.notes.append(
            f"{fitted.skipped} of {steps} steps skipped, not finite: learning rate halved at each; "
            f"the parameters are those of epoch {fitted.best}"
        )
    return fitted


def _train(
    state: FitState,
    loss: Callable[[Tensor], Tensor],
    order: Iterator[Tensor],
    schedule: Schedule,
    first: int,
    steps: int,
    project: Callable[[], None],
    share: Callable[[Sequence[Tensor]], None],
) -> None:
    """One epoch, from step ``first`` of ``steps``; it ends early after ``TRIES`` non-finite steps in a row."""
    losses = []
    for step, indices in enumerate(order, first):
        value = backward(state.optimizer.tensors, loss, indices, schedule.micro_batch, schedule.grad_clip, share)
        if value is None:
            state.fitted.skipped += 1
            state.failures += 1
            state.factor /= 2
            state.restore()
        else:
            losses.append(value)
            state.optimizer.step(state.factor * schedule.rate(step, steps))
            with torch.no_grad():
                project()
            state.failures = 0
        if state.failures >= TRIES:
            break
    if losses:
        state.fitted.train.append(sum(losses) / len(losses))


def _batches(train: Tensor, schedule: Schedule, seed: int) -> list[list[Tensor]]:
    """Sequence indices of every step, by epoch: parts of one order after the other of all training sequences."""
    if not schedule.epochs:
        return []
    generator = torch.Generator().manual_seed(seed)
    count = schedule.per_epoch(len(train))
    orders = [train[torch.randperm(len(train), generator=generator)] for _ in range(schedule.epochs)]
    drawn = torch.cat(orders)[: schedule.epochs * count]
    return [list(part.split(schedule.batch)) for part in drawn.split(count)]


def _with_prefetch(
    steps: Sequence[Tensor], following: Sequence[Tensor], ahead: Callable[[Tensor], None]
) -> Iterator[Tensor]:
    """Yield ``steps``, each after a call of ``ahead`` with its successor; ``following`` succeeds the last."""
    for index, indices in enumerate(steps):
        for successor in [*steps[index + 1 : index + 2], *following][:1]:
            ahead(successor)
        yield indices


@torch.no_grad()
def _mean_loss(
    loss: Callable[[Tensor], Tensor],
    validation: Sequence[Tensor],
    ahead: Callable[[Tensor], None],
    following: Sequence[Tensor],
    share: Callable[[Sequence[Tensor]], None],
) -> float:
    """The mean loss over the validation batches, which processes share; NaN if there are none."""
    owned = [own_part(len(validation), rank, here().size) for rank in range(here().size)]
    mine = [validation[at] for at in owned[here().rank]]
    shown, means = _with_prefetch(mine, following, ahead), []
    for turn in range(max(map(len, owned))):
        share([validation[own[turn]] if turn < len(own) else validation[0][:0] for own in owned])
        if turn < len(mine):
            part = next(shown)
            means.append((len(part), float(loss(part))))
    means = [pair for process in from_everyone(means) for pair in process]
    return sum(count * value for count, value in means) / sum(map(len, validation)) if means else math.nan
