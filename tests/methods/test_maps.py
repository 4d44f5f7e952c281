"""Learned maps: their inverses, masks, and the two properties that are really kept."""

from __future__ import annotations

import pytest
import torch

from lowbit.methods.maps import LearnedMap, band, open_share

MATRICES = ["masked", "lu", "blocks", "svd"]


def learned(kind, noise=0.0, size=12, condition=1e3, **options):
    map = LearnedMap(kind, 3, size, condition, block_size=4, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in map.leaves.values():
            leaf += noise * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    map.begin(1, 1)
    return map


def dense(value):
    return torch.diag_embed(value) if value.ndim == 2 else value


@pytest.mark.parametrize("kind", [*MATRICES, "diagonal", "rotation"])
def test_every_map_starts_at_the_identity(kind):
    value, inverse = learned(kind).value()
    if kind == "rotation":
        assert torch.equal(value, torch.tensor([1.0, 0.0], dtype=torch.float64).expand(3, 12, 2))
        return
    assert torch.equal(dense(value), torch.eye(12, dtype=torch.float64).expand(3, 12, 12))
    assert inverse is None or torch.equal(inverse, dense(value))


@pytest.mark.parametrize("kind", MATRICES)
def test_the_inverse_is_the_inverse_and_has_gradients(kind):
    map = learned(kind, 0.1)
    value, inverse = map.value()
    eye = torch.eye(12, dtype=torch.float64)
    assert not torch.allclose(value, eye.expand(3, 12, 12), atol=1e-2)
    assert torch.allclose(value @ inverse, eye.expand(3, 12, 12), atol=1e-12)

    def both(*leaves):
        map.leaves = dict(zip(map.leaves, leaves, strict=True))
        return map.value()

    leaves = [leaf.detach().clone().requires_grad_() for leaf in map.leaves.values()]
    assert torch.autograd.gradcheck(both, leaves)


def test_blocks_stay_blocks():
    value, inverse = learned("blocks", 0.1).value()
    outside = torch.block_diag(*[torch.ones(4, 4)] * 3) == 0
    assert value[:, outside].abs().max() == 0
    assert inverse[:, outside].abs().max() == 0
    assert (value[:, ~outside].abs() > 0).all()


def test_svd_conditions_are_bounded_whatever_the_numbers():
    map = learned("svd", 50.0, condition=100.0)
    value, _ = map.value()
    assert float(torch.linalg.cond(value.detach()).max()) <= 100.0 * (1 + 1e-6)


@pytest.mark.parametrize("kind", [*MATRICES, "diagonal"])
def test_the_recorded_condition_is_never_below_the_true_one(kind):
    for noise in (0.01, 0.1, 0.5):
        map = learned(kind, noise)
        assert (map.conditions() >= torch.linalg.cond(dense(map.value()[0])) * (1 - 1e-9)).all()


@pytest.mark.parametrize("kind", ["masked", "lu", "blocks", "diagonal"])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_conditions_are_kept_below_the_bound(kind, noise):
    map = learned(kind, noise, condition=20.0)
    before = {name: leaf.detach().clone() for name, leaf in map.leaves.items()}
    broken = float(torch.linalg.cond(dense(map.value()[0])).max()) > 20
    touched = map.keep_condition()
    assert broken <= touched or kind == "diagonal"  # a diagonal is bounded by construction
    assert float(torch.linalg.cond(dense(map.value()[0])).max()) <= 20 * (1 + 1e-9)
    if not touched:
        assert all(torch.equal(before[name], leaf) for name, leaf in map.leaves.items())


def test_a_singular_matrix_is_pulled_back_too():
    map = learned("masked")
    with torch.no_grad():
        map.leaves["full"].fill_(1.0)
    assert map.keep_condition()
    assert torch.isfinite(map.value()[1]).all()
    assert float(torch.linalg.cond(map.value()[0]).max()) <= 1e3


@pytest.mark.parametrize("kind", ["masked", "blocks"])
@pytest.mark.parametrize("stability", [1.0, 0.1])
def test_dominance_is_really_kept(kind, stability):
    map = learned(kind, 0.8, stability=stability)
    assert float(map.margins().min()) < 0
    map.keep_dominant()
    value, _ = map.value()
    diagonal = value.diagonal(dim1=-2, dim2=-1)
    others = value.abs().sum(-1) - diagonal.abs()
    assert (diagonal > 0).all()
    assert (others < diagonal).all()
    assert float(map.margins().min()) > 0
    again = value.clone()
    map.keep_dominant()
    assert torch.allclose(map.value()[0], again, atol=1e-14)  # a second time finds nothing to do


def test_the_mask_is_the_papers():
    # Equation 6 with size 8 and T = 4: epoch 1 opens |i - j| <= 2.
    mask = band(8, open_share("gradual", 1, 4, 8), 0.01)
    for i in range(8):
        for j in range(8):
            assert float(mask[i, j]) == pytest.approx(1.0 if i == j else 0.01 if abs(i - j) <= 2 else 0.0)
    assert (band(8, open_share("gradual", 4, 4, 8), 1.0) == 1).all()
    # The released code, e counted from 0: |i - j| < floor((size - 1) / (T - 1) e) + 1.
    for epoch in range(1, 5):
        opened = int(7 / 3 * (epoch - 1)) + 1
        wanted = (torch.arange(8)[:, None] - torch.arange(8)).abs() < opened
        assert torch.equal(band(8, open_share("released", epoch, 4, 8), 1.0) == 1, wanted)
    assert open_share("released", 1, 1, 8) == 0  # no division by zero with one epoch
    assert open_share("gradual", 1, 1, 8) == 1


def test_closed_entries_get_no_gradient_and_open_ones_the_stability_factor():
    map = learned("masked", 0.1, stability=0.1)
    map.begin(1, 4)
    (map.value()[0].sum()).backward()
    grad = map.leaves["full"].grad[0]
    distance = (torch.arange(12)[:, None] - torch.arange(12)).abs()
    assert (grad[distance == 0] == 1).all()
    assert torch.allclose(grad[(distance > 0) & (distance <= 3)], torch.tensor(0.1, dtype=torch.float64))
    assert (grad[distance > 3] == 0).all()


def literal_margin(matrices):
    """The least ``(|a_ii| - sum_j |a_ij|) / |a_ii|``, row by row."""
    rows = [(abs(m[i][i]), sum(map(abs, m[i])) - abs(m[i][i])) for m in matrices.tolist() for i in range(len(m))]
    return min((own - others) / own for own, others in rows)


@pytest.mark.parametrize("condition", [1.001, 5.0, 1e3])
@pytest.mark.parametrize("kind", ["masked", "blocks"])
def test_dominance_and_condition_hold_together(kind, condition):
    """A large diagonal entry that the bound pulls in must not leave its row behind."""
    learned = LearnedMap(kind, 2, 8, condition=condition, block_size=8, dtype=torch.float64)
    learned.begin(1, 1)
    diagonal = torch.tensor([20.0, 20, 20, 20, 0.02, 0.02, 0.02, 0.02], dtype=torch.float64)
    others = 0.14 * (1 - torch.eye(8, dtype=torch.float64))
    with torch.no_grad():
        learned.leaves["full"].copy_((torch.eye(8, dtype=torch.float64) + others) * diagonal[:, None])
        learned.keep_dominant()
        before = literal_margin(learned.value()[0])
        assert learned.keep_condition()
    assert 0.01 < before < 0.03  # 7 entries of 0.14
    assert literal_margin(learned.value()[0]) >= before - 1e-12
    assert float(learned.conditions().max()) <= condition
    assert float(torch.linalg.cond(learned.value()[0]).max()) <= condition


@pytest.mark.parametrize("kind", ["masked", "blocks", "lu"])
def test_a_map_that_cannot_be_pulled_in_starts_again(kind):
    learned = LearnedMap(kind, 2, 8, condition=10.0, block_size=4)
    learned.begin(1, 1)
    with torch.no_grad():
        learned.leaves["full"][0] += 1e20
        assert learned.keep_condition()
    assert float(learned.conditions().max()) <= 10.0
    assert torch.equal(learned.value()[0][1], torch.eye(8))


@pytest.mark.parametrize("kind", ["masked", "lu", "blocks"])
def test_what_the_condition_was_computed_from_serves_the_next_loss_once(kind, monkeypatch):
    """One inverse a step, with its gradient; anything that changes in between makes it anew."""
    learned = LearnedMap(kind, 2, 8, block_size=4, dtype=torch.float64)
    learned.begin(1, 1)
    with torch.no_grad():
        for leaf in learned.leaves.values():
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    made = []
    compute = LearnedMap._value
    monkeypatch.setattr(LearnedMap, "_value", lambda self: made.append(0) or compute(self))
    wanted = [value.detach() for value in learned.value()]

    def gradient():
        for leaf in learned.leaves.values():
            leaf.grad = None
        value, inverse = learned.value()
        (value.square().sum() + inverse.pow(3).sum()).backward()
        return [leaf.grad.clone() for leaf in learned.leaves.values()], [value.detach(), inverse.detach()]

    exact, _ = gradient()
    made.clear()
    assert not bool(learned.exceeding().any())
    found, values = gradient()
    assert len(made) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, wanted, strict=True))
    gradient()  # the graph is gone: it computes again
    assert len(made) == 2
    learned.exceeding()
    with torch.no_grad():
        next(iter(learned.leaves.values())).mul_(1.5)
    assert not torch.equal(gradient()[1][0], wanted[0])
    learned.exceeding()
    learned.begin(0, 1)
    assert not torch.equal(learned.value()[1].detach(), wanted[1])
