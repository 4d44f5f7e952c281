"""Estimators of static ranges: counts, percentiles, and the search for the least error."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.quant.range_estimators import MSE, RangeEstimator, ValueCounts, clipped_share
from lowbit.quant.static_activations import NVFP4_ACTS, StaticInt

MIN_MAX = RangeEstimator("min-max")


def seen_of(*parts: torch.Tensor) -> ValueCounts:
    seen = ValueCounts()
    for part in parts:
        seen.add(part)
    return seen


def drawn(count: int = 20000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def error(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, format: StaticInt) -> float:
    return float((format.on_qparams(x, format.qparams(low, high)) - x).double().square().mean())


def test_counts_of_parts_add_up_in_any_order() -> None:
    x = drawn() * torch.logspace(-8, 3, 20000)
    one, other = seen_of(x), seen_of(*reversed(x.split(777)))
    assert torch.equal(one.counts, other.counts)
    assert int(one.counts.sum()) == len(x)
    assert (float(one.low), float(one.high)) == (float(x.min()), float(x.max()))
    assert (float(other.low), float(other.high)) == (float(x.min()), float(x.max()))


def test_values_are_ascending_and_within_a_128th_of_what_was_counted() -> None:
    x = drawn(300)
    values, counts = seen_of(x).values()
    assert bool((values.diff() > 0).all())
    found = values.repeat_interleave(counts)
    assert torch.allclose(found, x.sort().values, rtol=2**-7)


def test_min_max_covers_everything_and_zero() -> None:
    low, high = MIN_MAX.range(seen_of(drawn() + 100), StaticInt(8, False))
    assert float(low) == 0
    assert float(high) == float((drawn() + 100).max())


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_a_percentile_leaves_out_its_share_at_either_end(percent: float) -> None:
    x = drawn()
    seen = seen_of(x)
    low, high = RangeEstimator("percentile", percent).range(seen, StaticInt(8, False))
    share = percent / 100
    assert torch.allclose(high, x.quantile(share), rtol=0.02)
    assert torch.allclose(low, x.quantile(1 - share), rtol=0.02)
    assert clipped_share(seen, low, high) == pytest.approx(2 * (1 - share), rel=0.2)  # bins are a 128th wide


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_finds_a_range_as_good_as_any(bits: int, symmetric: bool) -> None:
    x, format = drawn() + 0.3, StaticInt(bits, symmetric)
    x[:5] = torch.tensor([9.0, -6.0, 8.0, 11.0, -5.0])
    found = error(x, *MSE.range(seen_of(x), format), format)
    assert found < error(x, *MIN_MAX.range(seen_of(x), format), format)
    tried = torch.linspace(0.02, 1, 60)
    ends = [(x.min() * a, x.max() * b) for a in tried for b in (tried if not symmetric else [a])]
    best = min(error(x, low.reshape(1), high.reshape(1), format) for low, high in ends)
    assert found <= 1.03 * best  # both grids are discrete


def test_one_massive_value_decides_min_max_and_not_a_percentile() -> None:
    x = torch.cat([drawn(), torch.tensor([500.0])])
    format = StaticInt(4, False)
    wide, narrow = (rule.range(seen_of(x), format)[1] for rule in (MIN_MAX, RangeEstimator.parse("99.99")))
    assert float(wide) == 500
    assert 3 < float(narrow) < 5
    # At 16 bits the precision lost to covering it costs less than clipping it.
    assert float(MSE.range(seen_of(x), StaticInt(16, False))[1]) == 500


def test_a_format_with_scales_for_groups_is_not_clipped_by_the_search() -> None:
    seen = seen_of(torch.cat([drawn(), torch.tensor([500.0])]))
    assert [float(end) for end in MSE.range(seen, NVFP4_ACTS)] == [float(seen.low), 500.0]


def test_zeros_have_a_range() -> None:
    for rule in (MIN_MAX, MSE, RangeEstimator.parse("99")):
        assert [float(end) for end in rule.range(seen_of(torch.zeros(4)), StaticInt(8, False))] == [0, 0]


@pytest.mark.parametrize("text", ["minmax", "50", "100", "-1", "nan", "inf", ""])
def test_words_that_are_no_estimator_are_refused(text: str) -> None:
    with pytest.raises(LowbitError, match="min-max, mse, or a percentile"):
        RangeEstimator.parse(text)


@pytest.mark.parametrize("text", ["min-max", "mse", "99.99"])
def test_names_are_read_back(text: str) -> None:
    assert RangeEstimator.parse(text).name == text


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(LowbitError, match="NaN or infinite"):
        seen_of(torch.tensor([1.0, float("nan")]))
