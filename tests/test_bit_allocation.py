"""The choice of widths within a budget, against trying everything."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from lowbit.analysis import knapsack as budgets
from lowbit.analysis.bit_allocation import Linear, formats, fused, with_formats, within_budget
from lowbit.analysis.knapsack import least_loss
from lowbit.errors import LowbitError
from lowbit.models.architecture import Architecture, LayerKind
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme_names import parse_scheme, with_overrides

BITS = (3, 4, 8)


def linear(name: str, block: int = 0, sensitivity: float = 1.0, **changes) -> Linear:
    spec = changes.get("spec", IntFormat(4, 16))
    rtn = changes.get("rtn", {bits: 4.0**-bits for bits in (2, 3, 4, 5, 6, 8)})
    given = {"name": f"model.layers.{block}.{name}", "block": block, "shape": (32, 64), "spec": spec, "rtn": rtn}
    return Linear(**given | {"sensitivity": sensitivity, "input": 0.0, "own": rtn[spec.bits], **changes})


def tried(costs, losses, room):
    """The least loss of all choices that fit."""
    best = math.inf
    for picked in itertools.product(*(range(len(group)) for group in costs)):
        if sum(group[at] for group, at in zip(costs, picked, strict=True)) <= room:
            best = min(best, sum(group[at] for group, at in zip(losses, picked, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_that_fits_loses_less(seed):
    draw = random.Random(seed)
    unit = draw.choice([1, 7, 64])
    costs = [[unit * draw.randint(1, 9) for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 5))]
    losses = [[draw.random() for _ in group] for group in costs]
    room = draw.randint(sum(map(min, costs)) - unit, sum(map(max, costs)) + unit)
    picked = least_loss(costs, losses, room)
    if picked is None:
        assert tried(costs, losses, room) == math.inf
        return
    assert sum(group[at] for group, at in zip(costs, picked, strict=True)) <= room
    total = sum(group[at] for group, at in zip(losses, picked, strict=True))
    assert total == pytest.approx(tried(costs, losses, room), rel=1e-12)


def test_a_budget_of_too_many_steps_is_still_kept(monkeypatch):
    monkeypatch.setattr(budgets, "UNITS", 16)
    draw = random.Random(0)
    costs = [[draw.randint(100, 999) for _ in range(3)] for _ in range(6)]
    losses = [[1000.0 / cost for cost in group] for group in costs]
    room = sum(map(min, costs)) + 700
    picked = least_loss(costs, losses, room)
    assert sum(group[at] for group, at in zip(costs, picked, strict=True)) <= room
    total = sum(group[at] for group, at in zip(losses, picked, strict=True))
    assert tried(costs, losses, room) <= total < sum(map(max, losses))


def test_a_choice_of_infinite_loss_is_none():
    assert least_loss([[1, 2]], [[math.inf, 1.0]], 1) is None
    assert least_loss([[1, 2]], [[math.inf, 1.0]], 2) == [1]


def test_linears_that_read_one_tensor_get_one_format():
    group = [
        linear("self_attn.q_proj", sensitivity=0.1),
        linear("self_attn.k_proj", sensitivity=5.0, spec=IntFormat(4)),
    ]
    other = [linear("mlp.down_proj", sensitivity=1.0), linear("mlp.down_proj", 1, sensitivity=1.0)]
    names = (("self_attn.q_proj", "self_attn.k_proj"), ("mlp.down_proj",))
    like = Architecture("llama", "model.layers", "lm_head", "model.embed_tokens", (LayerKind(names, ()),) * 2)
    groups = fused([other[1], group[1], other[0], group[0]], like)
    assert [[one.name for one in some] for some in groups] == [
        [group[1].name, group[0].name],
        [other[0].name],
        [other[1].name],
    ]
    base = IntFormat(4, 16)
    weights = 4 * 32 * 64
    picked = within_budget(groups, base, BITS, 7 * weights)
    # Room for one more group of two at 8 bits, and 3 more for one of the others: the worst group comes first.
    assert picked[0] == IntFormat(8, 16)
    assert sum(spec.bits_per_value(64) * len(some) for spec, some in zip(picked, groups, strict=True)) <= 4 * 7
    assert formats(other[:1], IntFormat(4, 32), (8,)) == [IntFormat(8, 16)]


def test_a_budget_that_nothing_fits_into_says_what_would():
    with pytest.raises(LowbitError, match=r"at least 4\.000 are needed"):
        within_budget([[linear("a")]], IntFormat(4, 16), BITS, 3 * 32 * 64)


def test_what_a_format_holds_exactly_is_not_made_coarser():
    exact = linear("a", sensitivity=0.0, rtn={3: 0.5, 4: 0.0, 8: 0.0})
    assert (exact.sensitivity_at(3), exact.sensitivity_at(4), exact.sensitivity_at(8)) == (math.inf, 0.0, 0.0)


def test_the_part_of_a_rounded_input_stays():
    one = linear("a", sensitivity=1.0, input=0.75)
    assert one.sensitivity_at(8) == pytest.approx(0.75 + 0.25 / 256)
    assert linear("a", sensitivity=1.0, input=1.5).sensitivity_at(3) == 1.0


def test_full_names_come_before_globs_and_what_they_said_before_goes():
    one, two = linear("mlp.up_proj"), linear("mlp.up_proj", 1)
    before = with_overrides(parse_scheme("w4a16g16-sym"), {one.name: "w2", "*.up_proj": "w6g16", "lm_head": "w8"})
    made = with_formats(before, [[one], [two]], [IntFormat(4, 16), IntFormat(6, 16)])
    assert made.module(one.name).weight == IntFormat(4, 16)
    assert made.module(two.name).weight == IntFormat(6, 16)
    assert [glob for glob, _ in made.overrides] == [one.name, "*.up_proj", "lm_head"]
