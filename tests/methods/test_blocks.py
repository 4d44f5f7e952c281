"""Matrices in blocks of the group's width: where they fold, what they mix, and that the function stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_contract import attempt, check_codes, check_function, check_ops, check_result, check_shipped

from lowbit.errors import LowbitError
from lowbit.methods import RTN
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.maps import DOMINANCE, LearnedMap
from lowbit.methods.options import with_options
from lowbit.methods.sites import apply, group_width, make_site
from lowbit.models.block import Calib
from lowbit.models.forward import relative_error, run_all
from tiny import block_of, planned, tiny_model

WIDTHS = [("nvfp4a16", 16), ("mxfp4", 32), ("w4a8g16", 16)]


def heads_of(scheme, head=64, dtype=torch.float32):
    """A layer whose heads have 64 channels, its input, and its edge from v to o."""
    block, x = block_of(tiny_model("llama-odd", head_dim=head, hidden_size=64), 1, dtype=dtype)
    block = planned(block, scheme)
    return block, x, next(edge for edge in block.edges() if edge.kind == "heads")


def site_of(block, edge, **options):
    matrix = LearnedMap("masked", 0, 0, dtype=torch.float64, **options)
    return make_site(block, edge, edge.kind, "matrix", matrix, shift=True, in_groups=True)


@pytest.mark.parametrize(("scheme", "width"), WIDTHS)
def test_a_map_mixes_what_shares_a_scale_and_nothing_else(scheme, width):
    block, _, edge = heads_of(scheme)
    site = site_of(block, edge)
    assert (site.map.kind, site.map.block_size, site.online) == ("blocks", width, False)
    site.map.begin(1, 1)
    with torch.no_grad():
        site.map.leaves["full"] += 0.1
    value, _ = site.map.value()
    inside = torch.block_diag(*[torch.ones(width, width)] * (64 // width)) > 0
    assert value.shape == (edge.layout.kv, 64, 64)
    assert bool((value[:, inside] != 0).all())
    assert bool((value[:, ~inside] == 0).all())


@pytest.mark.parametrize(("scheme", "width"), WIDTHS)
def test_blocks_fold_exactly_in_float64(scheme, width):
    block, x, edge = heads_of(scheme, dtype=torch.float64)
    site = site_of(block, edge)
    site.map.begin(1, 1)
    noise = torch.randn(site.map.leaves["full"].shape, generator=torch.Generator().manual_seed(0)) / width**0.5
    with torch.no_grad():
        site.map.leaves["full"] += noise.double()
        params, online = apply(block, [site], block.params)
    assert not online
    assert relative_error(params[f"{edge.src.module}.weight"], block.params[f"{edge.src.module}.weight"]) > 0.1
    assert relative_error(run_all(replace(block, params=params), x), run_all(block, x)) < 1e-20


def test_the_mask_opens_within_blocks_and_dominance_is_kept_there():
    block, _, edge = heads_of("nvfp4a16")
    site = site_of(block, edge)
    site.map.begin(1, 4)  # a quarter of 16: four neighbours on either side
    with torch.no_grad():
        site.map.leaves["full"] += 1.0
    open_entries = (site.map.value()[0][0, :16, :16] != 0).sum(1)
    assert open_entries.tolist() == [min(i, 4) + 1 + min(15 - i, 4) for i in range(16)]
    assert float(site.map.margins().min()) < 0
    site.map.keep_dominant()
    assert float(site.map.margins().min()) >= 1 - DOMINANCE - 1e-9


def test_where_groups_lie_across_heads_or_there_are_none_a_map_spans_the_head():
    for scheme, head in (("nvfp4a16", 24), ("mxfp4", 16), ("w4a8", 64)):
        block, _, edge = heads_of(scheme, head)
        assert group_width(block, edge) is None
        assert site_of(block, edge).map.kind == "masked"


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4", "nvfp4"])
def test_a_fit_in_blocks_keeps_its_word(scheme):
    block, x, _ = heads_of(scheme)
    calib = Calib(x, x, run_all(block, x))
    step = with_options(AffineQuant(), block="group", dominance="enforce", epochs=2)
    found = attempt(with_options(step, held_out=0.0), block, calib)  # the last epoch, whether it helps or not
    check_result(found)
    check_ops(found)
    check_function(found)
    check_codes(attempt(RTN(), found.done, calib))
    check_shipped(step, block, calib)
    sites = found.done.record[1]["affinequant"]["sites"]
    assert sites["1.heads"]["map"] == "blocks"
    assert 0 < sites["1.heads"]["margin"] < 1


def test_behind_a_norm_blocks_stay_at_run_time():
    block, x, _ = heads_of("nvfp4a16")
    calib = Calib(x, x, run_all(block, x))
    found = attempt(with_options(AffineQuant(), block="group", mlp="matrix", epochs=1, held_out=0.0), block, calib)
    check_ops(found)
    check_function(found)
    (op,) = found.done.ops.values()
    outside = torch.block_diag(*[torch.ones(16, 16)] * 4) == 0
    assert bool((op.matrix[outside] == 0).all())
    assert not torch.equal(op.matrix, torch.eye(64))


def test_other_parametrisations_are_refused():
    with pytest.raises(LowbitError, match=r"block 'group' with parametrisation 'svd' given.*or block 'head'"):
        with_options(AffineQuant(), block="group", parametrisation="svd")
