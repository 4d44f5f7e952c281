"""What is gathered over tokens, against a loop over tokens; and the options that choose among it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.methods import reassemble
from lowbit.methods.dropping import DropPlan
from lowbit.methods.gptq import GPTQ, inverse_factor
from lowbit.methods.gptq_columns import gptq_codes
from lowbit.methods.reassemble import Reassemble, candidate_counts
from lowbit.methods.statistics import Statistics, input_statistics, paired_statistics, stride_for
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.quant.scheme_names import parse_scheme, with_overrides
from tiny import block_of, planned, tiny_model


@cache
def case(scheme="w4a4"):
    block, x = block_of(tiny_model("llama-odd"), 1)
    block = planned(block, scheme)
    return block, Calib(x, x, run_all(block, x))


def inputs_of(block, x, linear, batch=4, quantized=False):
    """What a linear reads, ``(tokens, in)``, batch by batch as a method sees it."""
    seen = []
    run_all(block, x, quantized=quantized, taps={linear: seen.append}, batch=batch)
    return [part.flatten(0, -2) for part in seen]


def test_figures_are_those_of_a_loop_over_tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 6, generator=generator)
    x[2, 3] *= 50
    x[4, 0] = 0  # a token of zeros counts and adds nothing
    seen = Statistics(("gram", "normalized_gram", "magnitude", "crest", "peak", "low", "high", "tokens"))
    for part in x.split(2):
        seen.add(part)
    gram, normalized_gram = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    magnitude, crest, peak = (torch.zeros(6, dtype=torch.float64) for _ in range(3))
    for token in x.reshape(-1, 6).double():
        rms = (sum(value**2 for value in token) / 6) ** 0.5
        for i in range(6):
            magnitude[i] += token[i].abs()
            peak[i] = max(peak[i], token[i].abs())
            crest[i] += (token[i] / rms) ** 8 if rms else 0
            for j in range(6):
                gram[i, j] += token[i] * token[j]
                normalized_gram[i, j] += token[i] * token[j] / rms**2 if rms else 0
    assert seen.count == 35
    for name, wanted in (
        ("gram", gram),
        ("normalized_gram", normalized_gram),
        ("magnitude", magnitude),
        ("crest", crest),
    ):
        # Sums of some hundred float32 products of either sign; eighth powers lose three bits more.
        torch.testing.assert_close(seen[name].double(), wanted, rtol=2e-5, atol=2e-5 * float(wanted.max()))
    assert torch.equal(seen["peak"].double(), peak)
    rows = x.reshape(-1, 6)
    assert torch.equal(seen["tokens"], rows)
    assert torch.equal(seen["low"], rows.amin(0))
    assert torch.equal(seen["high"], rows.amax(0))


def test_shares_that_are_merged_are_one():
    """What two processes saw of the tokens is what one would have seen of all."""
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    want = ("gram", "normalized_gram", "magnitude", "crest", "peak", "low", "high", "tokens")
    whole, first, second = (Statistics(want) for _ in range(3))
    whole.add(x)
    first.add(x[:4])
    second.add(x[4:])
    kept = {name: value.clone() for name, value in second.values.items()}
    first.merge(second)
    assert first.count == whole.count == 9
    for name in want:
        torch.testing.assert_close(first[name], whole[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(second[name], kept[name])


def test_one_token_in_so_many_is_taken():
    x = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(5))
    some = Statistics(("tokens",), every=4)
    some.add(x)
    assert torch.equal(some["tokens"], x.reshape(-1, 4)[2::4])
    assert (some.count, some.given) == (7, 30)
    block, calib = case()
    (down,) = block.linear_groups()[-1]
    seen = input_statistics(block, calib.x_fp, [down], ("tokens",), batch=2, every=3)[down]
    assert torch.equal(seen["tokens"], torch.cat(list(inputs_of(block, calib.x_fp, down, 2)))[1::3])


@pytest.mark.parametrize("shape", [(32, 512), (128, 512), (128, 2048), (7, 300)])
def test_a_sample_of_tokens_has_all_positions_alike(shape):
    """The first token of a window is often massive: it is no more of the sample than of the text."""
    every = stride_for(shape, 2048)
    seen = Statistics(("tokens",), every)
    for index, part in enumerate(torch.arange(shape[1]).float().expand(shape)[..., None].split(4)):
        own = Statistics(("tokens",), every, first=4 * index * shape[1])
        own.add(part[:2])
        own.add(part[2:])
        seen.merge(own)
    counts = torch.bincount(seen["tokens"].flatten().long(), minlength=shape[1])
    assert 0.8 * 2048 <= seen.count <= 1.2 * 2048
    assert seen.count == len(seen["tokens"])
    assert seen.given == shape[0] * shape[1]
    assert int(counts[0]) <= 2 * seen.count / shape[1] + 1
    assert int((counts > 0).sum()) >= 0.8 * min(seen.count, shape[1])


def test_paired_figures_are_those_of_a_loop_over_tokens():
    block, calib = case()
    drawn = torch.randn(calib.x_fp.shape, generator=torch.Generator().manual_seed(1))
    calib = replace(calib, x_q=calib.x_q + 0.2 * drawn, batch=1)
    (down,) = block.linear_groups()[-1]
    want = ("gram", "cross", "normalized_gram", "normalized_cross")
    seen = paired_statistics(block, block, calib, [down], want)[down]
    x = torch.cat(inputs_of(block, calib.x_q, down, quantized=True)).double()
    y = torch.cat(inputs_of(block, calib.x_fp, down)).double()
    wanted = {name: torch.zeros(96, 96, dtype=torch.float64) for name in want}
    for a, b in zip(x, y, strict=True):
        rms = a.square().mean().sqrt()
        wanted["gram"] += torch.outer(a, a)
        wanted["cross"] += torch.outer(b, a)
        wanted["normalized_gram"] += torch.outer(a / rms, a / rms)
        wanted["normalized_cross"] += torch.outer(b / rms, a / rms)
    for name, exact in wanted.items():
        assert torch.allclose(seen[name].double(), exact, atol=1e-4 * float(exact.abs().max())), name


def test_a_token_counts_alike_in_the_normalized_figures_however_large_it_is():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    sizes = torch.logspace(-2, 4, 40)[:, None]
    found = []
    for rows in (x, x * sizes):
        seen = Statistics(("gram", "normalized_gram", "crest"))
        seen.add(rows)
        found.append(seen)
    torch.testing.assert_close(found[0]["normalized_gram"], found[1]["normalized_gram"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0]["crest"], found[1]["crest"], rtol=1e-4, atol=1e-4)
    assert float((found[0]["gram"] - found[1]["gram"]).abs().max()) > 1e3


@pytest.mark.parametrize("tokens", ["unweighted", "normalized"])
def test_gptq_takes_the_second_moments_that_it_is_told_to_take(tokens):
    scheme = with_overrides(parse_scheme("w3a16"), {"*.self_attn.*": "float", "*.gate_proj": "float"})
    scheme = with_overrides(scheme, {"*.up_proj": "float"})  # down_proj alone, so that its input is the float one
    block, calib = case(scheme)
    (down,) = block.linear_groups()[-1]
    found = GPTQ(tokens=tokens, shrinkage=0)(block, calib).qweights
    assert list(found) == [down]
    codes = {}
    for kind in ("unweighted", "normalized"):
        gram = torch.zeros(96, 96)
        for rows in inputs_of(block, calib.x_q, down):
            unit = rows.square().mean(1, keepdim=True).sqrt() if kind == "normalized" else torch.ones(len(rows), 1)
            gram = gram + (rows / unit).T @ (rows / unit)
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        upper, _ = inverse_factor(gram[order][:, order], 0.01)
        qparams = scheme.weight.qparams(block.weight(down))
        codes[kind] = gptq_codes(block.weight(down), upper, order, qparams, scheme.weight, 128)
    assert not torch.equal(codes["unweighted"], codes["normalized"])
    assert torch.equal(found[down].codes, codes[tokens])


@pytest.mark.parametrize("tokens", ["unweighted", "normalized"])
@pytest.mark.parametrize("peaks", ["absolute", "relative"])
def test_reassembly_splits_and_drops_by_the_figures_that_it_is_told_to_take(peaks, tokens, monkeypatch):
    block, calib = case()
    (down,) = block.linear_groups()[-1]
    rows = torch.cat(inputs_of(block, calib.x_fp, down))
    unit = rows.square().mean(1, keepdim=True).sqrt()
    seen = {}

    def counts(peak, most, grid):
        seen["peak"] = peak
        return candidate_counts(peak, most, grid)

    class Plan(DropPlan):
        def __init__(self, weight, gram, damping, keep):
            seen["gram"] = gram.float()  # before it is overwritten
            super().__init__(weight, gram, damping, keep)

    monkeypatch.setattr(reassemble, "candidate_counts", counts)
    monkeypatch.setattr(reassemble, "DropPlan", Plan)
    Reassemble(peaks=peaks, tokens=tokens)(block, calib)
    wanted = {"absolute": rows.abs().amax(0), "relative": (rows / unit).pow(8).mean(0).pow(1 / 8)}
    normalized = rows / unit
    torch.testing.assert_close(seen["peak"], wanted[peaks], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        seen["gram"], normalized.T @ normalized if tokens == "normalized" else rows.T @ rows, rtol=1e-4, atol=1e-3
    )
    assert float((wanted["absolute"] / wanted["relative"]).std()) > 0.01


def test_one_massive_token_decides_an_absolute_peak_and_hardly_a_relative_one():
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    x[7] *= 1000  # as many times larger in every channel: no channel stands out in it
    seen = Statistics(("peak", "crest"))
    seen.add(x)
    relative = (seen["crest"] / seen.count).pow(1 / 8)
    assert float(relative.max() / relative.min()) < 1.3
    assert float(seen["peak"].max() / seen["peak"].min()) > 3
    # Largest value first, the two orders are not the same.
    assert not torch.equal(relative.argsort(), seen["peak"].argsort())


def test_all_candidates_of_a_layer_share_one_sequence_of_drops(monkeypatch):
    """What a smaller candidate drops, a larger one drops too, in one order; split channels are never among them."""
    block, calib = case()
    plans, calls = [], []

    class Plan(DropPlan):
        def __init__(self, *args):
            plans.append(self)
            super().__init__(*args)

        def without(self, count, copies):
            out = super().without(count, copies)
            calls.append((count, list(self.order), copies))
            return out

    monkeypatch.setattr(reassemble, "DropPlan", Plan)
    Reassemble(most=0.3)(block, calib)
    assert len(plans) == 1
    assert len(calls) > 2
    assert [count for count, _, _ in calls] == sorted({count for count, _, _ in calls})
    for count, order, copies in calls:
        assert len(order) == count == int((copies - 1).sum())
        assert order == plans[0].order[:count]
    assert not set(plans[0].order) & set(torch.nonzero(calls[-1][2] > 1).flatten().tolist())


@pytest.mark.parametrize(
    ("method", "options", "near"),
    [
        (GPTQ, {"tokens": "normalised"}, "normalized"),
        (Reassemble, {"tokens": "unweightd"}, "unweighted"),
        (Reassemble, {"peaks": "relativ"}, "relative"),
    ],
)
def test_unknown_choices_are_refused_with_the_nearest(method, options, near):
    with pytest.raises(LowbitError, match=f"did you mean '{near}'"):
        method(**options)
