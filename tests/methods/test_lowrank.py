"""Low-rank correction: what is trained is what ships, ranks keep to their budget, the window's error falls."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.methods import METHODS, RTN
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.lowrank import Correction, LowRank, adaptive_ranks
from lowbit.methods.options import with_options
from lowbit.methods.training import fit
from lowbit.models.block import Calib
from lowbit.models.forward import relative_error, run_all, run_quantized
from tiny import block_of, planned, tiny_model

W4A4, W3 = "w4a4", "w3a16g16-asym"
FAMILIES = ["llama-odd", "gemma3", "phi3", "opt"]


@cache
def case(name, scheme, count=2):
    block, x = block_of(tiny_model(name), 1, count)
    block = planned(block, scheme)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    return block, Calib(x, x + 0.05 * x.std() * noise, run_all(block, x))


def low_rank(**options):
    return with_options(LowRank(), **options)


def error_of(block, calib):
    return relative_error(run_quantized(RTN()(block, calib), calib.x_q), calib.y_fp)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scheme", [W4A4, W3], ids=["w4a4", "w3g16"])
@pytest.mark.parametrize(
    "changes", [{}, {"share": "input", "ranks": "adaptive", "norms": True}], ids=["plain", "all"]
)
def test_what_is_trained_is_what_ships(changes, scheme, name):
    block, calib = case(name, scheme)
    options = low_rank(epochs=1, lr=5e-3, loss="mse", held_out=0.0, **changes)
    correction = Correction(options, block, calib)
    fitted = fit(correction.groups(), correction.loss, 4, options.schedule)
    with torch.no_grad():
        last, error = correction.quantized(), float(correction.loss(torch.arange(4)))
    done = RTN()(correction.fold(fitted), calib)
    for linear, q in done.qweights.items():
        assert torch.equal(q.dequantize(), last[f"{linear}.weight"]), linear
    assert set(done.params) == set(block.params)  # no bias that the architecture lacks
    changed = [key for key in block.params if not torch.equal(done.params[key], block.params[key])]
    assert {f"{linear}.weight" for linear in block.linears()} <= set(changed)
    assert bool([key for key in changed if "norm" in key]) == bool(changes.get("norms"))
    got = relative_error(run_quantized(done, calib.x_q), calib.y_fp)
    assert got == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_correction_lowers_the_error_of_its_window(name):
    block, calib = case(name, W3)
    before = error_of(block, calib)
    done = low_rank(epochs=4, lr=5e-3, held_out=0.0)(block, calib)
    assert error_of(done, calib) < 0.95 * before
    assert list(done.record) == [1]


@pytest.mark.parametrize("scheme", [W4A4, W3, "w4a16g16-sym"])
@pytest.mark.parametrize("before", ["nothing", "affinequant", "awq", "lowrank"])
def test_a_correction_of_no_epochs_changes_no_code(before, scheme):
    block, calib = case("llama-odd", scheme)
    if before != "nothing":
        step = METHODS[before]()
        block = (step if step.schedule is None else with_options(step, epochs=1))(block, calib)
    still = low_rank(epochs=0, share="input", norms=True)(block, calib)
    for name, value in block.params.items():
        assert torch.equal(still.params[name], value)
    wanted, found = RTN()(block, calib).qweights, RTN()(still, calib).qweights
    for name, q in wanted.items():
        assert torch.equal(found[name].codes, q.codes)
        assert torch.equal(found[name].qparams.scale, q.qparams.scale)
        assert torch.equal(found[name].qparams.zero, q.qparams.zero)


def test_fixed_clips_stay_those_found_before():
    block, calib = case("llama-odd", W3)
    clipped = with_options(AffineQuant(), epochs=1)(block, calib)
    fixed = low_rank(epochs=1, clips=False)(clipped, calib)
    assert all(torch.equal(fixed.clips[name][0], low) for name, (low, _) in clipped.clips.items())


def test_ranks():
    block, calib = case("llama-odd", W3)
    for share in ("none", "input"):
        correction = Correction(LowRank(rank=4, share=share), block, calib)
        own = [pair for pair in correction.pairs if len(pair.linears) == 1]
        assert sorted(pair.linears[0] for pair in own) == sorted(block.linears())
        assert {pair.up.shape[1] for pair in own} == ({4} if share == "none" else {2})
        shared = [pair.linears for pair in correction.pairs if len(pair.linears) > 1]
        groups = [group for group in block.linear_groups() if len(group) > 1]
        assert shared == ([] if share == "none" else groups)
    adaptive = Correction(LowRank(rank=4, ranks="adaptive"), block, calib)
    cost = sum(pair.up.numel() + pair.down.numel() for pair in adaptive.pairs)
    assert cost <= sum(4 * sum(block.weight(name).shape) for name in block.linears())
    assert len({pair.up.shape[1] for pair in adaptive.pairs}) > 1


def test_adaptive_ranks_keep_to_their_budget_and_go_where_the_error_is():
    generator = torch.Generator().manual_seed(0)
    errors = {str(i): torch.rand(8, generator=generator).sort(descending=True).values * 4**i for i in range(4)}
    cost = {"0": 5, "1": 7, "2": 11, "3": 13}
    ranks = adaptive_ranks(errors, cost, 3)
    assert sum(ranks[n] * cost[n] for n in cost) <= 3 * sum(cost.values())
    left = 3 * sum(cost.values()) - sum(ranks[n] * cost[n] for n in cost)
    assert all(ranks[n] == 8 or cost[n] > left for n in cost)
    assert ranks["3"] == max(ranks.values()) > ranks["0"]
    assert min(ranks.values()) >= 1


def test_weight_decay_holds_the_correction_small():
    block, calib = case("llama", W3, 1)
    size = {}
    for decay in (0.0, 100.0):
        done = low_rank(epochs=12, lr=5e-3, weight_decay=decay, held_out=0.0)(block, calib)
        size[decay] = sum(float((done.weight(n) - block.weight(n)).square().sum()) for n in block.linears())
    assert size[100.0] < 0.5 * size[0.0]


def test_runtime_ops_are_seen():
    block, calib = case("llama", W4A4, 1)
    moved = with_options(AffineQuant(), epochs=1, qkv="matrix")(block, calib)
    assert moved.ops
    done = low_rank(epochs=1)(moved, calib)
    assert done.ops == moved.ops
    assert relative_error(run_all(done, calib.x_fp), calib.y_fp) < 0.1


@pytest.mark.parametrize("bad", [{"rank": 0}, {"ranks": "some"}, {"share": "all"}, {"loss": "kl"}, {"epochs": -1}])
def test_options_that_make_no_sense_are_refused(bad):
    with pytest.raises(LowbitError, match=next(iter(bad))):
        low_rank(**bad)


def test_a_correction_of_nothing_is_the_block_itself():
    block, calib = case("llama", W3)
    block = replace(block, formats={})
    assert LowRank()(block, calib) is block
