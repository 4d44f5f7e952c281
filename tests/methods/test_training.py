"""The training loop: its optimiser against torch's, what it keeps, and what it does when numbers break."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.methods.adam import Adam
from lowbit.methods.training import TRIES, Schedule, fit


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_adam_is_torchs_where_every_entry_takes_part():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = leaf(1.0, -2.0, 0.5), leaf(1.0, -2.0, 0.5)
    adam, reference = Adam([([ours], 0.01)]), torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)
    for _ in range(30):
        ours.grad = torch.randn(3, generator=generator, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        adam.step(1.0)
        reference.step()
    # Both add about 1e-8 to a denominator near 1, ours relative to the gradients: 30 steps of 0.01.
    assert torch.allclose(ours, theirs, atol=1e-8)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-20, 2.0**20])
def test_a_loss_in_another_unit_gives_the_same_steps(scale):
    """Powers of two scale exactly; with torch's epsilon the smallest would hardly move anything."""

    def trained(factor):
        x = torch.tensor([3.0, -1.0, 0.1], requires_grad=True)
        weights = torch.tensor([1.0, 0.1, 1e-3])
        fit([([x], 0.05)], lambda i: factor * (weights * (x - i.float().mean()) ** 2).sum(), 8, Schedule(5))
        return x.detach()

    assert not torch.equal(trained(1.0), torch.tensor([3.0, -1.0, 0.1]))
    assert torch.equal(trained(scale), trained(1.0))


def test_a_tensor_without_any_gradient_stays_finite_and_where_it_is():
    x = leaf(1.0, 2.0)
    adam = Adam([([x], 0.1)])
    x.grad = torch.zeros_like(x)
    adam.step(1.0)
    assert x.tolist() == [1.0, 2.0]


def test_a_step_that_is_not_finite_takes_the_moments_back_too():
    """Two steps of a huge gradient, a broken one, then one of the other sign: as if it were the first of all."""
    x, calls = leaf(3.0), []

    def loss(chosen):
        calls.append(chosen)
        return x.sum() * [1e6, 1e6, math.nan, -1.0][len(calls) - 1]

    fitted = fit([([x], 0.1)], loss, 4, Schedule(1, held_out=0.0, decay="none"))
    assert fitted.skipped == 1
    assert x.tolist() == pytest.approx([3.0 + 0.1 / 2])


def test_an_entry_released_late_takes_an_ordinary_first_step():
    ours, theirs = leaf(0.0, 0.0), leaf(0.0, 0.0)
    adam, reference = Adam([([ours], 0.01)]), torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)
    for step in range(600):
        before = (float(ours[1].detach()), float(theirs[1].detach()))
        for tensor in (ours, theirs):
            tensor.grad = torch.tensor([1.0, 1.0 if step == 599 else 0.0], dtype=torch.float64)
        adam.step(1.0)
        reference.step()
    assert abs(float(ours[1].detach()) - before[0]) == pytest.approx(0.01, rel=1e-6)
    assert abs(float(theirs[1].detach()) - before[1]) > 0.02  # what the counter for each entry is for


def test_fit_finds_a_minimum_and_reports_each_epoch():
    x = leaf(3.0)
    seen = []
    fitted = fit(
        [([x], 0.1)], lambda i: (x - 1).square().sum(), 8, Schedule(8, batch=2, decay="none"), begin=seen.append
    )
    assert abs(float(x.detach()) - 1) < 0.05
    assert len(fitted.train) == 8
    assert len(fitted.held_out) == 9
    assert fitted.held_out[0] == 4.0
    assert seen[:8] == list(range(1, 9))
    assert seen[-1] == fitted.best
    assert fitted.held_out[fitted.best] == min(fitted.held_out)


def test_the_best_on_held_out_sequences_is_kept_not_the_last():
    x = leaf(0.0)
    schedule = Schedule(20, held_out=0.25, decay="none")
    _, held = schedule.split(8)

    def loss(chosen):  # training pulls to 5, the held-out sequences want 1
        wanted = 1.0 if set(chosen.tolist()) <= set(held.tolist()) else 5.0
        return (x - wanted).square().sum()

    fitted = fit([([x], 0.1)], loss, 8, schedule)
    assert 0 < fitted.best < 20
    assert abs(float(x.detach()) - 1) < 0.5


def test_without_held_out_sequences_the_last_epoch_is_kept():
    x = leaf(0.0)
    fitted = fit([([x], 0.1)], lambda i: (x - 5).square().sum(), 4, Schedule(3, held_out=0.0, decay="none"))
    assert fitted.best == 3
    assert float(x) > 1
    assert math.isnan(fitted.held_out[0])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_steps_that_are_not_finite_are_skipped_and_told(broken):
    x = leaf(3.0)
    calls = []

    def loss(chosen):
        value = (x - 1).square().sum()
        calls.append(0)
        return value * broken if torch.is_grad_enabled() and len(calls) % 7 == 3 else value

    fitted = fit([([x], 0.1)], loss, 8, Schedule(10, batch=2))
    assert fitted.skipped > 0
    assert torch.isfinite(x).all()
    assert float(x) < 3
    assert "not finite" in fitted.notes[0]


def test_a_gradient_that_is_not_finite_never_reaches_a_parameter():
    x = leaf(0.0, 3.0)
    fitted = fit([([x], 0.1)], lambda i: x.abs().sqrt().sum(), 8, Schedule(2))  # infinite slope at 0
    assert x.tolist() == [0.0, 3.0]
    assert fitted.best == 0
    assert fitted.skipped == TRIES
    assert "stopped in epoch" in fitted.notes[0]


@pytest.mark.parametrize("kept", [False, True])
def test_a_fit_that_gave_up_stays_so_whatever_epochs_are_left_and_when_it_goes_on(kept, tmp_path):
    x, steps = leaf(3.0), []

    def loss(chosen):
        if not torch.is_grad_enabled():
            return (x - 1).square().sum()
        steps.append(chosen)  # the first are broken, later ones would not be
        return (x - 1).square().sum() * (math.nan if len(steps) <= TRIES else 1.0)

    keep = tmp_path / "state.safetensors" if kept else None
    for _ in range(2 if kept else 1):  # the second time it goes on from the file
        told = fit([([x], 0.1)], loss, 40, Schedule(4), keep=keep)
        assert told.skipped == len(steps) == TRIES
        assert "stopped in epoch 1" in told.notes[0]
        assert len([note for note in told.notes if "stopped in epoch" in note]) == 1
        assert len(told.held_out) == 1  # nothing was measured after it
        assert told.best == 0
        assert float(x) == 3.0


def test_epochs_of_zero_change_nothing_and_draws_do_not_depend_on_global_state():
    x = leaf(3.0)
    assert fit([([x], 0.1)], lambda i: x.square().sum(), 8, Schedule(0)).held_out == [9.0]
    assert float(x) == 3.0
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        y = leaf(3.0)
        fit([([y], 0.1)], lambda i, y=y: (y - i.double().mean()).square().sum(), 8, Schedule(3))
        results.append(float(y))
    assert results[0] == results[1]


def test_gradients_are_clipped_together():
    x, y = leaf(30.0), leaf(40.0)
    norms = []

    def project():
        norms.append(math.hypot(float(x.grad), float(y.grad)))

    fit(
        [([x, y], 0.1)], lambda i: x.square().sum() + y.square().sum(), 4, Schedule(1, grad_clip=0.5), project=project
    )
    assert norms == pytest.approx([0.5] * len(norms))


@pytest.mark.parametrize(
    "bad", [{"epochs": -1}, {"batch": 0}, {"held_out": 1.0}, {"grad_clip": -1.0}, {"decay": "?"}, {"sequences": -1}]
)
def test_schedules_that_make_no_sense_are_refused(bad):
    with pytest.raises(LowbitError, match=next(iter(bad))):
        Schedule(**{"epochs": 1, **bad})


def test_split_always_leaves_something_to_train_on():
    for n in (1, 2, 3, 16):
        train, held = Schedule(1).split(n)
        assert len(train) >= 1
        assert sorted([*train.tolist(), *held.tolist()]) == list(range(n))
        assert bool(len(held)) == (n > 1)
    assert Schedule(1, decay="cosine").rate(10, 10) == pytest.approx(0.1)


def test_every_block_and_step_holds_out_the_same_sequences():
    """A step must not be validated on sequences that a step before it has learned from."""
    splits = []
    for seed in (0, 7):
        torch.manual_seed(seed)
        splits.append(Schedule(3 + seed, batch=1 + seed, held_out=0.25).split(16))
    assert torch.equal(splits[0][1], splits[1][1])
    assert len(splits[0][1]) == 4
    assert not set(splits[0][0].tolist()) & set(splits[0][1].tolist())


def test_a_fit_that_was_stopped_goes_on_with_the_same_bits(tmp_path):
    """Masks, a step that was not finite and a rate that falls: all that the next epoch depends on is kept."""

    def attempt(keep=None, stop=None):
        x, y = leaf(30.0, 1.0), leaf(4.0)
        seen = []

        def loss(chosen):
            seen.append(len(chosen))
            if len(seen) == stop:
                raise KeyboardInterrupt
            bad = math.inf if 3.7 < y.item() < 3.9 else 1.0
            return ((x - chosen.double().mean()).square().sum() + y.square().sum()) * bad

        return fit([([x], 0.5), ([y], 0.1)], loss, 8, Schedule(5, 2, decay="cosine"), keep=keep), x, y

    whole, *values = attempt()
    assert whole.skipped
    file = tmp_path / "state.safetensors"
    for stop in (3, 9, 12, 4):
        with pytest.raises(KeyboardInterrupt):
            attempt(file, stop)
    again, *found = attempt(file)
    assert again == whole
    assert all(torch.equal(a, b) for a, b in zip(found, values, strict=True))
    assert attempt(file)[0] == whole  # finished: read, not trained


def test_the_end_of_an_epoch_lies_between_its_steps_and_its_validation():
    x, told = leaf(3.0), []

    def loss(chosen):
        told.append("step" if torch.is_grad_enabled() else "validation")
        return x.square().sum()

    def end():
        assert not torch.is_grad_enabled()
        told.append("end")

    fit([([x], 0.1)], loss, 8, Schedule(2, batch=7), begin=lambda epoch: told.append(epoch), end=end)
    assert told == ["validation", 1, "step", "end", "validation", 2, "step", "end", "validation", 2]


@pytest.mark.parametrize(("held_out", "patience"), [(0.25, 5), (0.25, 2), (0.25, 0), (0.0, 5)])
def test_a_fit_ends_when_its_validation_loss_has_stopped_falling(held_out, patience, tmp_path):
    """Training pulls to 5, validation wants 1; without a validation split nothing says when to stop."""
    schedule = Schedule(30, held_out=held_out, decay="none", patience=patience)
    ends = held_out and patience

    def attempt(keep=None, stop=None):
        x, calls = leaf(0.0), []
        held = set(schedule.split(8)[1].tolist())

        def loss(chosen):
            calls.append(0)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return (x - (1.0 if set(chosen.tolist()) <= held else 5.0)).square().sum()

        return fit([([x], 0.1)], loss, 8, schedule, keep=keep), x

    whole, x = attempt()
    assert len(whole.train) == (whole.best + patience if ends else 30)
    assert len(whole.notes) == (1 if ends else 0)
    if ends:
        assert 0 < whole.best < 30 - patience
        after = f"epoch {whole.best + patience} of 30"
        assert whole.notes == [f"stopped after {after}: {patience} in a row without a lower validation loss"]
        file = tmp_path / "state.safetensors"
        with pytest.raises(KeyboardInterrupt):
            attempt(file, 20)
        again, y = attempt(file)
        assert again == whole
        assert torch.equal(x, y)
        assert attempt(file)[0] == whole


def test_an_epoch_of_some_sequences_takes_new_ones_before_any_comes_again():
    """Of 14 training sequences, 4 an epoch: three epochs of new ones, then the two left and two of the next order."""
    x, seen = leaf(0.0), []
    schedule = Schedule(7, batch=2, held_out=0.125, sequences=4)

    def loss(chosen):
        if torch.is_grad_enabled():
            seen.append(chosen.tolist())
        return (x - 1).square().sum()

    fit([([x], 0.01)], loss, 16, schedule)
    assert [len(chosen) for chosen in seen] == [2] * 14
    order = [index for chosen in seen for index in chosen]
    assert sorted(order[:14]) == sorted(order[14:]) == schedule.split(16)[0].tolist()
    assert order[:14] != order[14:]
    whole = Schedule(2, held_out=0.125, sequences=99)
    assert (whole.per_epoch(14), schedule.per_epoch(3)) == (14, 3)


def test_many_small_tensors_are_updated_as_each_would_be_alone():
    """Buckets hold several tensors, some without a gradient or a rate at times; the largest has one of its own."""
    shapes = [(3, 5), (2,), (7, 7, 2), (1,), (600, 500), (4, 4)]

    def made():
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    together, alone = made(), made()
    rates = [0.1, 0.1, 0.0, 0.3, 0.01, 0.2]
    adam, each = Adam([([t], r) for t, r in zip(together, rates, strict=True)]), []
    each = [Adam([([t], r)]) for t, r in zip(alone, rates, strict=True)]
    start = [t.detach().clone() for t in together]
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        for index, (one, other) in enumerate(zip(together, alone, strict=True)):
            grad = torch.randn(one.shape, generator=generator) * (torch.rand(one.shape, generator=generator) > 0.5)
            one.grad = other.grad = None if (step + index) % 4 == 0 else grad
        adam.step(0.5)
        for own in each:
            own.step(0.5)
    for one, other, before, rate in zip(together, alone, start, rates, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, before) == (rate == 0)


def test_a_step_does_not_depend_on_how_many_were_taken_back():
    """A fit that restored earlier parameters has counted further than one that is resumed from them."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(20_000, generator=generator), torch.randn(20_000, generator=generator)
    ends = []
    for counted in (167, 3_000):
        x = start.clone().requires_grad_()
        adam = Adam([([x], 0.1)])
        for moment, value in zip(adam.moments[0], (0.3, 0.2, 167.0), strict=True):
            moment.fill_(value)
        adam._most = counted
        x.grad = gradient.clone()
        adam.step(1.0)
        ends.append(x.detach())
    assert torch.equal(*ends)
