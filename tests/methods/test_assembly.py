"""Merging channels after norms: the metric by brute force, the matching by a literal loop, and every reader of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import lowbit
from lowbit.errors import LowbitError
from lowbit.methods import RTN
from lowbit.methods import assembly as module
from lowbit.methods.assembly import MergePlan, distances
from lowbit.methods.reassemble import Reassemble, fold, gather_behind
from lowbit.models.block import Calib
from lowbit.models.forward import run, run_all
from lowbit.models.runtime_ops import Gather, Matrix
from lowbit.pipeline.recipe import Recipe
from lowbit.runs.streamed_model import StreamedModel
from tiny import block_of, planned, save_tiny, tiny_ids, tiny_model

KINDS = ["bipartite", "one-to-one"]


def quantized(folder, out, steps):
    """The run of a recipe of ``steps`` at w4a4, of the model in ``folder``."""
    text = str(folder / "calib.txt")
    return lowbit.quantize(
        str(folder), out, scheme="w4a4", recipe=Recipe("r", steps), data=text, samples=4, length=24
    )


def problem(channels=14, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, channels, generator=generator, dtype=torch.float64)
    return x, weight


def copied(extra):
    """Copies of channel 0 that need ``extra`` more places."""
    copies = torch.ones(14, dtype=torch.long)
    copies[0] += extra
    return copies


def as_matrix(idx, divisor, into):
    """Gather, mean and division as the matrix that rows are multiplied by."""
    out = torch.zeros(len(idx), len(idx), dtype=torch.float64)
    out[idx, torch.arange(len(idx))] = 1.0
    gone = torch.nonzero(into >= 0).flatten()
    out[gone, into[gone]] = 1.0
    return out / divisor


def literal_distance(x, weight, i, j):
    """Equation 5, token by token and output by output: the change of x_i w_i + x_j w_j when the two merge."""
    total = 0.0
    for token in x:
        for row in weight:
            before = token[i] * row[i] + token[j] * row[j]
            after = (token[i] + token[j]) / 2 * (row[i] + row[j])
            total += float(before - after) ** 2
    return total


def literal_merges(x, weight, keep, count, one_to_one):
    """The matching as the paper and ToMe put it, in plain loops."""
    evens = [i for i in range(x.shape[1]) if i % 2 == 0 and not keep[i]]
    odds = [j for j in range(x.shape[1]) if j % 2 == 1 and not keep[j]]
    edges = [(literal_distance(x, weight, i, j), i, j) for i in evens for j in odds]
    merges = []
    if not one_to_one:
        closest = [min(edge for edge in edges if edge[1] == i) for i in evens]
        return [(i, j) for _, i, j in sorted(closest)[:count]]
    while len(merges) < count:
        used = {channel for pair in merges for channel in pair}
        _, i, j = min(edge for edge in edges if not {edge[1], edge[2]} & used)
        merges.append((i, j))
    return merges


def test_the_distance_is_the_papers_by_brute_force():
    x, weight = problem()
    even, odd = torch.arange(0, 14, 2), torch.arange(1, 14, 2)
    found = distances(x.T @ x, weight, even, odd)
    wanted = [[literal_distance(x, weight, i, j) for j in odd.tolist()] for i in even.tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_matching_is_that_of_plain_loops_and_leaves_split_channels_alone(seed, kind):
    x, weight = problem(seed=seed)
    copies = torch.ones(14, dtype=torch.long)
    copies[4], copies[9] = 3, 2
    plan = MergePlan(weight, x.T @ x, copies > 1, kind == "one-to-one")
    idx, divisor, merged, into = plan.without(3, copies)
    assert plan.merges == literal_merges(x, weight, copies > 1, 3, kind == "one-to-one")
    gone = [i for i, _ in plan.merges]
    assert into[gone].tolist() == [j for _, j in plan.merges]
    assert (into >= 0).sum() == 3
    assert sorted(idx[gone].tolist()) == [4, 4, 9]
    assert not {4, 9} & {channel for pair in plan.merges for channel in pair}
    if kind == "one-to-one":
        assert len({j for _, j in plan.merges}) == 3
    # The function that the matching promises: copies exact, each group its mean times the sum of its columns.
    gather = gather_behind(None, idx, divisor, into)
    found = gather(x) @ merged[:, idx].T
    groups = {}
    for i, j in plan.merges:
        groups.setdefault(j, [j]).append(i)
    wanted = sum(x[:, group].mean(1, keepdim=True) * weight[:, group].sum(1) for group in groups.values()) + sum(
        x[:, [k]] * weight[:, k] for k in range(14) if k not in gone and k not in groups
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # 1/3 is stored in float32
    torch.testing.assert_close(gather(x), x @ as_matrix(idx, divisor, into), rtol=1e-6, atol=1e-6)


def test_many_may_share_one_partner_only_where_that_is_asked_for():
    x, weight = problem()
    x[:, 3] *= 1e-3
    weight[:, 3] *= 1e-3  # one weak channel, close to all
    x[:, ::2] *= 0.1
    sizes = {}
    for kind in KINDS:
        copies = copied(6)
        plan = MergePlan(weight, x.T @ x, copies > 1, kind == "one-to-one")
        assert plan.most == 6
        plan.without(6, copies)
        partners = [j for _, j in plan.merges]
        sizes[kind] = max(partners.count(j) for j in partners)
    assert sizes["one-to-one"] == 1 < sizes["bipartite"]


@pytest.mark.parametrize("kind", KINDS)
def test_merges_come_in_one_order_for_all_candidates(kind):
    x, weight = problem()
    plan = MergePlan(weight, x.T @ x, copied(6) > 1, kind == "one-to-one")
    for count in (1, 3, 6):
        plan.without(count, copied(count))
        assert plan.merges == literal_merges(x, weight, copied(6) > 1, count, kind == "one-to-one")


@cache
def norm_case(name, dtype=torch.float64):
    block, x = block_of(tiny_model(name), 1, dtype=dtype)
    block = planned(block, "w4a4")
    return block, next(edge for edge in block.edges() if edge.kind == "norm"), Calib(x, x, run_all(block, x))


@pytest.mark.parametrize("name", ["llama-odd", "gemma3", "phi3", "opt"])
@pytest.mark.parametrize("dense", [False, True])
def test_merging_channels_with_equal_columns_leaves_the_float_function(dense, name):
    """What a merge leaves, (x_i - x_j)(w_i - w_j)/2, vanishes where the columns are equal: then merging is exact."""
    block, edge, calib = norm_case(name)
    readers = [dst.module for dst in edge.readers]
    params = dict(block.params)
    for reader in readers:
        params[f"{reader}.weight"] = params[f"{reader}.weight"].clone()
        params[f"{reader}.weight"][:, [0, 2]] = params[f"{reader}.weight"][:, [7, 7]]
    block = replace(block, params=params)
    wanted = run(block, calib.x_fp)
    norm = edge.src.module
    if dense:  # a matrix that runs there already
        block = replace(block, ops={norm: Matrix(torch.eye(64, dtype=torch.float64))})
    idx, into = torch.arange(64), torch.full((64,), -1)
    idx[[0, 2]], into[[0, 2]] = 5, 7  # three copies of 5; 0, 2 and 7 become one
    divisor = torch.ones(64, dtype=torch.float64)
    divisor[[0, 2, 5, 7]] = 3
    weight = torch.cat([block.weight(reader) for reader in readers])
    weight[:, 7] *= 3
    done = fold(block, edge, idx, divisor, weight, into)
    assert type(done.ops[norm]) is (Matrix if dense else Gather)
    assert done.ops[norm].width == 64
    assert dense or torch.equal(done.ops[norm].into, into)
    error = (run(done, calib.x_fp) - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-4 if any(edge.offset for edge in block.edges()) else 1e-7)
    assert (run(replace(done, ops={}), calib.x_fp) - wanted).abs().max() > 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_assembly_reaches_every_reader_of_the_folder(kind, tmp_path):
    save_tiny(tmp_path / "m", "llama-odd")
    steps = (("reassemble", Reassemble(sites="all", assembly=kind, most=0.3)), ("rtn", RTN()))
    made = quantized(tmp_path / "m", tmp_path / "out", steps)
    gathers = [name for name, op in made.manifest.runtime_ops.items() if op == "gather"]
    assert gathers
    assert all(name.endswith("norm") for name in gathers)
    ids = tiny_ids()
    simulated = torch.cat([logits for _, logits in StreamedModel(tmp_path / "out").logits(ids)])
    loaded = lowbit.load(tmp_path / "out")(ids, use_cache=False).logits.detach()
    assert float((loaded - simulated).abs().max() / simulated.abs().max()) < 1e-5
    for block in made.manifest.blocks:
        for name, figures in block.steps["reassemble"].items():
            assert figures["assembly"] == ("drop" if "down" in name else kind)
            assert figures["scores"][str(figures["copies"])] == min(figures["scores"].values())
    weights = sum(StreamedModel(tmp_path / "out").block(0).qweights[n].codes.numel() * 3 for n in LINEARS)
    plain = quantized(tmp_path / "m", tmp_path / "plain", steps[1:]).manifest
    more = 32 * 3 * 64 * len(gathers) / weights
    assert made.bits_per_weight == pytest.approx(plain.bits_per_weight + more)


LINEARS = [f"0.self_attn.{n}_proj" for n in "qkvo"] + [f"0.mlp.{n}_proj" for n in ("gate", "up", "down")]


def test_norms_alone_leave_down_proj_as_it_is():
    block, _, calib = norm_case("llama", torch.float32)
    done = Reassemble(sites="norms", assembly="one-to-one", most=0.3)(block, calib)
    assert len(done.record[1]["reassemble"]) == 2
    (down,) = block.linear_groups()[-1]
    assert torch.equal(done.weight(down), block.weight(down))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assembly": "bipartite"}, "not a product of means; choose assembly 'drop', or sites 'norms' or 'all'"),
        ({"assembly": "pad", "sites": "all"}, "one hidden_size and one intermediate_size .*allowed: drop"),
        ({"assembly": "one-to-on", "sites": "all"}, "did you mean 'one-to-one'"),
        ({"sites": "norm"}, "did you mean 'norms'"),
    ],
)
def test_what_cannot_be_stored_is_refused_in_one_line(options, message):
    with pytest.raises(LowbitError, match=message) as found:
        Reassemble(**options)
    assert "\n" not in str(found.value)


def test_channels_that_merge_already_are_not_gathered_again():
    with pytest.raises(LowbitError, match="already reassembled"):
        gather_behind(Gather(torch.arange(64), torch.ones(64)), torch.arange(64), torch.ones(64))
    assert module.ASSEMBLIES == ("drop", "bipartite", "one-to-one")
