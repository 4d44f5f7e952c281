"""The number core: one grid, rounded once (invariant 1), its gradients, and the activations of compressed-tensors."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from lowbit.errors import LowbitError
from lowbit.quant.affine import (
    Grid,
    QuantSpec,
    fake_quant,
    fake_quant_tokens,
    minmax_grid,
    quantize,
    stored_scale,
    usable_group_sizes,
)

FLOAT16 = torch.finfo(torch.float16)


def hard_weight(dtype, columns=32):
    """Rows of every kind that real and broken checkpoints hold; each kind stands for a way to go wrong."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(13, columns, generator=generator)
    rows[1] = rows[1].abs() + 0.5  # all above zero, and far from it
    rows[2] = -rows[2].abs() - 0.5  # all below
    rows[3] = 0.37  # constant
    rows[4] = -0.37
    rows[5] = 0
    rows[6] *= 1e-9  # below the smallest scale
    rows[7] *= 3e4 / rows[7].abs().max()  # huge, still within float16
    rows[8, : columns // 2] = 0  # one group of zeros beside one that is not
    rows[9, 0] = 40.0  # an outlier
    rows[10] = torch.arange(columns) % 4 - 1.5  # ties
    rows[11] = 1e-6 * rows[11].abs()  # scales that are subnormal in float16
    rows[12, ::2] = -0.0
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_quantized_is_what_was_simulated_bit_for_bit(bits, group, symmetric, dtype):
    weight, spec = hard_weight(dtype), QuantSpec(bits, group, symmetric)
    for low, high in ((1.0, 1.0), (0.7, 0.9)):
        grid = minmax_grid(weight, spec, low, high)
        q = quantize(weight, grid, spec)
        assert q.codes.dtype == torch.uint8
        assert int(q.codes.max()) <= spec.levels
        assert grid.scale.shape == grid.zero.shape == (13, 32 // (group or 32))
        assert torch.equal(grid.scale.to(torch.float16).to(dtype), grid.scale), "a scale that float16 cannot hold"
        assert bool((grid.scale > 0).all())
        assert torch.equal(grid.zero, grid.zero.round())
        assert 0 <= grid.zero.min() <= grid.zero.max() <= spec.levels
        simulated = fake_quant(weight, grid, spec)
        assert simulated.dtype == dtype
        assert torch.equal(q.dequantize(), simulated)
        assert bool(torch.isfinite(simulated).all())
        assert torch.equal(simulated[5], torch.zeros_like(simulated[5])), "zeros must stay exact"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_minmax_rounds_everything_inside_to_within_half_a_step(bits, symmetric):
    weight, spec = hard_weight(torch.float64), QuantSpec(bits, 16, symmetric)
    grid = minmax_grid(weight, spec)
    error = (fake_quant(weight, grid, spec) - weight).abs().unflatten(1, (2, 16)).amax(-1)
    # Half a step for rounding. Rounding the scale to float16 (11 bits: 2**-11 relative when it is normal, half of
    # 2**-24 absolute below) lets the far end of the range move by levels times that. An asymmetric zero is itself
    # rounded, which costs the ends another half step; a symmetric range has 2**(b-1) steps below its zero and one
    # less above, so its upper end lies half a step inside.
    moved = spec.levels * torch.maximum(grid.scale * 2.0**-11, torch.tensor(2.0**-25))
    assert bool((error <= grid.scale * 1.0 + moved + 1e-12).all())
    inner = weight.unflatten(1, (2, 16)).amax(-1) < 0  # symmetric and only negative: no upper end to clip
    if symmetric:
        assert bool((error <= grid.scale * 0.5 + moved + 1e-12)[inner].all())


def test_a_worked_asymmetric_example():
    spec = QuantSpec(2, None, symmetric=False)
    weight = torch.tensor([[-0.5, 0.0, 0.25, 1.0]])  # range 1.5 in 3 steps: scale 0.5, zero 1
    q = quantize(weight, minmax_grid(weight, spec), spec)
    assert q.grid.scale.item() == 0.5
    assert q.grid.zero.item() == 1
    assert q.codes.tolist() == [[0, 1, 1, 3]]  # 0.25 is half a step: a tie goes to the even 0, plus zero
    assert q.dequantize().tolist() == [[-0.5, 0.0, 0.0, 1.0]]


def test_a_worked_symmetric_example():
    spec = QuantSpec(3, None, symmetric=True)
    weight = torch.tensor([[-3.5, -1.0, 2.2, 3.5]])  # absmax 3.5 in 3.5 steps: scale 1, zero 4
    q = quantize(weight, minmax_grid(weight, spec), spec)
    assert (q.grid.scale.item(), q.grid.zero.item()) == (1.0, 4.0)
    assert q.codes.tolist() == [[0, 3, 6, 7]]  # -3.5 is a tie that goes to -4; 3.5 goes to 4 and is clipped to 3
    assert q.dequantize().tolist() == [[-4.0, -1.0, 2.0, 3.0]]


def test_groups_of_one_sign_have_a_range_that_includes_zero():
    spec = QuantSpec(4, None, symmetric=False)
    positive = torch.linspace(5, 6, 16)[None]
    assert minmax_grid(positive, spec).zero.item() == 0
    assert minmax_grid(-positive, spec).zero.item() == spec.levels


def test_the_scale_is_rounded_before_the_codes_are_chosen():
    # 1/3 in float16 is 0.33325195; with that scale 0.49995 is 1.5002 steps (code 2), with 1/3 itself 1.49985 (1).
    spec = QuantSpec(2, None, symmetric=False)
    weight = torch.tensor([[0.0, 1.0, 0.49995, 0.0]])
    assert quantize(weight, minmax_grid(weight, spec), spec).codes.tolist() == [[0, 3, 2, 0]]
    exact = QuantSpec(2, None, symmetric=False, scale_dtype=torch.float32)
    assert quantize(weight, minmax_grid(weight, exact), exact).codes.tolist() == [[0, 3, 1, 0]]


def test_scales_outside_of_float16_are_brought_to_its_ends():
    scale = stored_scale(torch.tensor([0.0, 1e-12, 1.0, 1e9]), torch.float16)
    assert scale.tolist() == [2.0**-24, 2.0**-24, 1.0, FLOAT16.max]
    weight = torch.tensor([[1e9, -1e8, 3.0, 0.0]])  # needs a scale of 1.3e8
    for symmetric in (True, False):
        spec = QuantSpec(4, None, symmetric)
        grid = minmax_grid(weight, spec)
        assert grid.scale.item() == FLOAT16.max
        assert torch.equal(quantize(weight, grid, spec).dequantize(), fake_quant(weight, grid, spec))


def inside_and_clipped(symmetric):
    """A weight, a shrunken grid on which some of it is clipped at both ends, and where it is not clipped."""
    spec = QuantSpec(3, 8, symmetric)
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grid = minmax_grid(weight, spec, 0.55, 0.6)
    steps = (weight.unflatten(1, (2, 8)) / grid.scale[..., None]).round() + grid.zero[..., None]
    inside = ((steps >= 0) & (steps <= spec.levels)).flatten(1)
    assert 0 < int((~inside).sum()) < inside.numel() // 2
    return spec, weight, grid, inside


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_a_weight_is_1_inside_the_range_and_0_where_it_is_clipped(symmetric):
    spec, weight, grid, inside = inside_and_clipped(symmetric)
    weight.requires_grad_()
    fake_quant(weight, grid, spec).sum().backward()
    # d/dw of (round(w / s) + z - z) * s passes through 1 / s * s: within two roundings of 1, not 1 exactly.
    torch.testing.assert_close(weight.grad, inside.double(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradients_of_scale_and_zero_are_those_of_the_straight_through_estimator(symmetric):
    spec, weight, grid, inside = inside_and_clipped(symmetric)
    scale, zero = grid.scale.clone().requires_grad_(), grid.zero.clone().requires_grad_()
    seed = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (fake_quant(weight, Grid(scale, zero), spec) * seed).sum().backward()
    # y = (c - z) s with c = clamp(round(w / s) + z), rounding's derivative being 1:
    # inside dy/ds = round(w / s) - w / s and dy/dz = 0; clipped dy/ds = c - z and dy/dz = -s.
    wide = grid.scale.repeat_interleave(8, 1)
    offset = grid.zero.repeat_interleave(8, 1)
    code = ((weight / wide).round() + offset).clamp(0, spec.levels)
    by_scale = torch.where(inside, (weight / wide).round() - weight / wide, code - offset)
    by_zero = torch.where(inside, 0.0, -wide)
    torch.testing.assert_close(scale.grad, (by_scale * seed).unflatten(1, (2, 8)).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(zero.grad, (by_zero * seed).unflatten(1, (2, 8)).sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_range_factors_move_the_scale_as_a_smooth_surrogate_does(symmetric):
    """Finite differences of the grid without any rounding: the straight-through gradient's definition."""
    spec = QuantSpec(4, 8, symmetric)
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    low, high = torch.full((3, 2), 0.8, dtype=torch.float64), torch.full((3, 2), 0.9, dtype=torch.float64)
    mix = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def smooth(w, low, high, zero=True):
        grouped = w.unflatten(1, (2, 8))
        top, bottom = grouped.amax(-1) * high, grouped.amin(-1) * low
        if symmetric:
            return (mix[0] * torch.maximum(top, -bottom) / 7.5).sum()
        scale = (top - bottom) / 15
        return (mix[0] * scale + mix[1] * -bottom / scale).sum()

    def graded(w, low, high):
        grid = minmax_grid(w, spec, low, high)
        return (mix[0] * grid.scale).sum() + (0 if symmetric else (mix[1] * grid.zero).sum())

    inputs = [t.clone().requires_grad_() for t in (weight, low, high)]
    graded(*inputs).backward()
    for which, step in ((0, 1e-6), (1, 1e-6), (2, 1e-6)):
        analytic, numeric = inputs[which].grad, torch.zeros_like(inputs[which])
        for index in range(numeric.numel()):
            ends = []
            for sign in (1, -1):
                moved = [weight.clone(), low.clone(), high.clone()]
                moved[which].view(-1)[index] += sign * step
                ends.append(smooth(*moved))
            numeric.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
        # Central differences err by step**2 and cancellation by 1e-16 / step. The gradient itself is taken at the
        # scale that float16 holds, 2**-11 away, which enters the zero's derivative to the second power.
        torch.testing.assert_close(analytic, numeric, rtol=3 * 2.0**-11, atol=1e-6)
        assert bool(numeric.abs().max() > 1e-3)


def library(x, bits, symmetric):
    """What stock compressed-tensors makes of ``x`` ``(sequences, tokens, width)``."""
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    return fake_quantize(x, scale, zero, args)


def tokens(width=48):
    x = torch.randn(3, 17, width, generator=torch.Generator().manual_seed(9))
    x[0, 0] = 0
    x[0, 1] = torch.arange(width) % 16 * 0.5 - 3.5  # multiples of half a step: ties
    x[0, 2] = x[0, 2].abs()
    x[0, 3] = -x[0, 3].abs()
    x[0, 4] = 0.123
    x[0, 5] *= 1e-30
    x[0, 6] *= 1e30
    x[0, 7, 1:] = 0
    x[0, 8] = torch.arange(width) * 1.0  # more ties, far from zero
    x[1] *= torch.logspace(-2, 2, 17)[:, None]
    return x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_activations_are_rounded_as_compressed_tensors_does_bit_for_bit(bits, symmetric):
    x, spec = tokens(), QuantSpec(bits, None, symmetric)
    assert torch.equal(fake_quant_tokens(x, spec), library(x, bits, symmetric))
    assert not torch.equal(fake_quant_tokens(x, spec), x)
    # Scale 1, zero odd, every value half way between two codes: the zero has to be added before the rounding.
    low = 3.0 if not symmetric else spec.levels / 2
    halves = torch.arange(-3, spec.levels - 3)[None, None] + 0.5
    ties = torch.cat([halves, torch.tensor([[[-low, spec.levels - low]]])], -1)
    assert torch.equal(fake_quant_tokens(ties, spec), library(ties, bits, symmetric))
    many = torch.randn(8, 512, 48, generator=torch.Generator().manual_seed(10))
    assert torch.equal(fake_quant_tokens(many, spec), library(many, bits, symmetric))
    heads = many.unflatten(-1, (3, 16)).transpose(1, 2)  # (sequences, heads, tokens, dim)
    assert torch.equal(fake_quant_tokens(heads, spec).flatten(0, 1), library(heads.flatten(0, 1), bits, symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_gradients_pass_the_rounding_and_reach_the_range(symmetric):
    x = torch.tensor([[-1.0, 0.3, 0.55, 2.0]], dtype=torch.float64, requires_grad=True)
    fake_quant_tokens(x, QuantSpec(4, None, symmetric))[0, 1].backward()
    scale = 2 / 7.5 if symmetric else 3 / 15
    residue = round(0.3 / scale) - 0.3 / scale  # d y / d scale
    wanted = [0.0, 1.0, 0.0, residue / 7.5] if symmetric else [-residue / 15, 1.0, 0.0, residue / 15]
    assert x.grad[0].tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("spec", "columns", "bits"),
    [
        (QuantSpec(4, 128), 4096, 4 + 16 / 128),
        (QuantSpec(4, 128, symmetric=False), 4096, 4 + (16 + 4) / 128),
        (QuantSpec(4, None), 4096, 4 + 16 / 4096),
        (QuantSpec(3, 64, symmetric=False), 576, 3 + (16 + 3) / 64),
        (QuantSpec(2, 16, scale_dtype=torch.float32), 32, 4.0),
        (QuantSpec(8, None, symmetric=False), 48, 8.5),
    ],
)
def test_bits_per_value(spec, columns, bits):
    assert math.isclose(spec.bits_per_value(columns), bits, rel_tol=1e-15)
    weight = torch.randn(6, columns)
    assert quantize(weight, minmax_grid(weight, spec), spec).stored_bits == pytest.approx(6 * columns * bits)


def test_specs_that_make_no_sense_are_refused():
    for bits in (1, 9):
        with pytest.raises(LowbitError, match=f"{bits} bits given; 2 to 8 are allowed"):
            QuantSpec(bits)
    with pytest.raises(LowbitError, match="group size 1 given"):
        QuantSpec(4, 1)
    with pytest.raises(LowbitError, match="group size 128 does not divide a width of 576; usable sizes: 16, 32"):
        QuantSpec(4, 128).groups(576)
    assert usable_group_sizes(20) == []
