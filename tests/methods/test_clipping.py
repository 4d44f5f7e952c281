"""Learned clipping ratios: where they start, how they move, and that they stay a share of the range."""

from __future__ import annotations

import pytest
import torch

from lowbit.methods.clipping import START, LearnedRatio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_starts_at_what_is_given_bit_for_bit(dtype):
    given = torch.cat([torch.linspace(0.001, 1, 5001, dtype=dtype), torch.tensor([1.0, 1.005], dtype=dtype)])
    assert torch.equal(LearnedRatio.at(given).value(), given)


def test_a_ratio_moves_along_the_sigmoid_and_never_below_zero():
    ratio = LearnedRatio.at(torch.tensor([1.0, 0.5, 1e-5]))
    ratio.value().sum().backward()
    slopes = [torch.tensor(x).sigmoid() * (1 - torch.tensor(x).sigmoid()) for x in (START, 0.0)]
    assert ratio.logit.grad[:2].tolist() == pytest.approx([float(slope) for slope in slopes])
    with torch.no_grad():
        ratio.logit.sub_(1.0)
    assert ratio.value().tolist() == pytest.approx(
        [float(torch.tensor(3.0).sigmoid()) + 1 - 0.98201, 0.26894, 0.0], rel=1e-4
    )


def test_the_papers_start_is_a_sigmoid_of_four():
    ratio = LearnedRatio.papers((2, 3), torch.device("cpu"))
    assert torch.equal(ratio.value(), torch.full((2, 3), 4.0).sigmoid())
