"""Formats of weights: one rounding formula, rounded once (invariant 1), its inverse, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch

from formats import Ternary
from lowbit.errors import LowbitError
from lowbit.quant.elements import Int
from lowbit.quant.format import Format, QParams, QTensor, split_groups, usable_group_sizes
from lowbit.quant.integer import IntFormat, integer
from lowbit.quant.scales import Plain, stored_scale

FLOAT16 = torch.finfo(torch.float16)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SCALES = [torch.float32, torch.bfloat16]


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


def spread(qparams):
    """``(rows, groups)`` so that it broadcasts against ``(rows, groups, size)``."""
    return QParams(qparams.scale[..., None], qparams.zero[..., None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_quantized_is_what_was_simulated_bit_for_bit(bits, group, symmetric, dtype):
    weight, format = hard_weight(dtype), IntFormat(bits, group, symmetric)
    for low, high in ((1.0, 1.0), (0.7, 0.9)):
        qparams = format.qparams(weight, low, high)
        q = format.quantize(weight, qparams)
        assert q.codes.dtype == torch.uint8
        assert int(q.codes.max()) <= format.levels
        assert qparams.scale.shape == qparams.zero.shape == (13, 32 // (group or 32))
        assert torch.equal(qparams.scale.to(torch.float16).to(dtype), qparams.scale), "a scale float16 cannot hold"
        assert bool((qparams.scale > 0).all())
        assert torch.equal(qparams.zero, qparams.zero.round())
        assert 0 <= qparams.zero.min() <= qparams.zero.max() <= format.levels
        simulated = format.fake_quant(weight, qparams)
        assert simulated.dtype == dtype
        assert torch.equal(q.dequantize(), simulated)
        assert torch.equal(format.fake_quant_clipped(weight, low, high), simulated)
        assert bool(torch.isfinite(simulated).all())
        assert torch.equal(simulated[5], torch.zeros_like(simulated[5])), "zeros must stay exact"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "format",
    [
        *(IntFormat(*own, dtype) for own in ((3, 16, False), (8, None, True)) for dtype in SCALES),
        Ternary(),
    ],
    ids=lambda format: f"{format.name}-{format.scales.dtype}",
)
def test_the_same_holds_for_other_scales_and_for_any_format(format: Format, dtype):
    weight = hard_weight(dtype)
    qparams = format.qparams(weight, 0.9, 0.8)
    q, stored = format.quantize(weight, qparams), format.scales.dtype
    # Whatever is narrower decides: a scale that one of the two dtypes holds as 0 would divide by it.
    assert torch.equal(qparams.scale.to(stored).to(dtype), qparams.scale)
    assert bool((qparams.scale > 0).all())
    assert torch.equal(q.dequantize(), format.fake_quant(weight, qparams))
    assert torch.equal(q.dequantize(), format.fake_quant_clipped(weight, 0.9, 0.8))
    assert bool(torch.isfinite(q.dequantize()).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_values_and_positions_are_inverse_to_each_other(bits, symmetric, dtype):
    format, eps = IntFormat(bits, 16, symmetric), torch.finfo(dtype).eps
    weight = hard_weight(dtype)
    qparams = format.qparams(weight)
    grouped, own = split_groups(weight, 2), spread(qparams)
    codes = torch.arange(format.levels + 1, dtype=dtype).expand(13, 2, -1)
    # A code minus a zero is exact; the product with the scale and the division by it are rounded once each, which
    # for numbers up to levels is at most levels * eps of a step, as is the sum with the zero.
    apart = (format.position(format.value(codes, own), own) - codes).abs()
    normal = own.scale * format.levels >= torch.finfo(dtype).smallest_normal / eps
    assert float(apart.where(normal, 0.0).max()) <= 2 * format.levels * eps
    if format.levels * eps < 0.5:  # all but 8-bit codes in bfloat16, which has 8 significant bits
        assert torch.equal(format.round(format.value(codes, own), own).where(normal, codes), codes)
    there = format.position(grouped, own)
    back = format.value(there, own)
    # Positions are held to eps of their size: of levels inside the range, of a weight in steps beyond it.
    size = torch.maximum(there.abs(), torch.tensor(float(format.levels), dtype=dtype))
    usable = torch.isfinite(there)
    assert bool(((back - grouped).abs() <= 2 * size * eps * own.scale)[usable & normal].all())
    assert int((usable & normal).sum()) > grouped.numel() // 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_nearest_code_is_within_half_a_step_of_the_position(bits, symmetric):
    format, weight = IntFormat(bits, 16, symmetric), hard_weight(torch.float64)
    qparams = format.qparams(weight, 0.8, 0.7)
    every = format.per_column(qparams, 32)
    codes, there = format.round(weight, every), format.position(weight, every)
    inside = (there > 0) & (there < format.levels)
    assert bool(((codes - there).abs() <= 0.5 + 1e-9)[inside].all())
    assert bool((codes == there.clamp(0, format.levels).round())[~inside].all())
    assert 0 < int((~inside).sum()) < inside.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [IntFormat(3, 16, False), IntFormat(4), Ternary()], ids=lambda format: format.name)
def test_every_column_by_itself_is_quantized_as_in_its_group(format: Format, dtype):
    """What GPTQ does, column by column."""
    weight = hard_weight(dtype)
    qparams = format.qparams(weight)
    q, every = format.quantize(weight, qparams), format.per_column(qparams, 32)
    assert every.scale.shape == every.zero.shape == (13, 32)
    for column in range(32):
        own = QParams(every.scale[:, column], every.zero[:, column])
        codes = format.round(weight[:, column], own)
        assert torch.equal(codes.to(torch.uint8), q.codes[:, column])
        assert torch.equal(format.value(codes, own), q.dequantize()[:, column])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_range_gives_the_qparams_that_it_was_made_of(bits, symmetric, dtype):
    format = IntFormat(bits, 16, symmetric)
    qparams = format.qparams(hard_weight(dtype), 0.9, 0.8)
    low, high = format.range_of(qparams)
    again = format.from_range(low, high)
    if dtype in (torch.float32, torch.float64):
        # A scale has 11 bits, a code 8 at most: their product is exact, and so is the way back.
        assert torch.equal(again.scale, qparams.scale)
        assert torch.equal(again.zero, qparams.zero)
        assert bool((low <= 0).all())
        assert bool((high >= 0).all())
        return
    finite = torch.isfinite(low) & torch.isfinite(high)
    assert int(finite.sum()) >= 24  # 16 bits do not hold the range of the huge row
    # Each end, their difference and the quotient are rounded once, and both ends are at most the range.
    slack = 4 * torch.finfo(dtype).eps * qparams.scale + FLOAT16.smallest_normal * FLOAT16.eps
    assert bool(((again.scale - qparams.scale).abs() <= slack)[finite].all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_minmax_rounds_everything_inside_to_within_half_a_step(bits, symmetric):
    weight, format = hard_weight(torch.float64), IntFormat(bits, 16, symmetric)
    qparams = format.qparams(weight)
    error = (format.fake_quant(weight, qparams) - weight).abs().unflatten(1, (2, 16)).amax(-1)
    # Half a step for rounding. Rounding the scale to float16 (11 bits: 2**-11 relative when it is normal, half of
    # 2**-24 absolute below) lets the far end of the range move by levels times that. An asymmetric zero is itself
    # rounded, which costs the ends another half step; a symmetric range has 2**(b-1) steps below its zero and one
    # less above, so its upper end lies half a step inside.
    moved = format.levels * torch.maximum(qparams.scale * 2.0**-11, torch.tensor(2.0**-25))
    assert bool((error <= qparams.scale * 1.0 + moved + 1e-12).all())
    inner = weight.unflatten(1, (2, 16)).amax(-1) < 0  # symmetric and only negative: no upper end to clip
    if symmetric:
        assert bool((error <= qparams.scale * 0.5 + moved + 1e-12)[inner].all())


def test_a_worked_asymmetric_example():
    format = IntFormat(2, None, symmetric=False)
    weight = torch.tensor([[-0.5, 0.0, 0.25, 1.0]])  # range 1.5 in 3 steps: scale 0.5, zero 1
    q = format.quantize(weight, format.qparams(weight))
    assert q.qparams.scale.item() == 0.5
    assert q.qparams.zero.item() == 1
    assert q.codes.tolist() == [[0, 1, 1, 3]]  # 0.25 is half a step: a tie goes to the even 0, plus zero
    assert q.dequantize().tolist() == [[-0.5, 0.0, 0.0, 1.0]]
    assert format.position(weight, q.qparams).tolist() == [[0.0, 1.0, 1.5, 3.0]]
    assert [end.item() for end in format.range_of(q.qparams)] == [-0.5, 1.0]


def test_a_worked_symmetric_example():
    format = IntFormat(3, None, symmetric=True)
    weight = torch.tensor([[-3.5, -1.0, 2.2, 3.5]])  # absmax 3.5 in 3.5 steps: scale 1, zero 4
    q = format.quantize(weight, format.qparams(weight))
    assert (q.qparams.scale.item(), q.qparams.zero.item()) == (1.0, 4.0)
    assert q.codes.tolist() == [[0, 3, 6, 7]]  # -3.5 is a tie that goes to -4; 3.5 goes to 4 and is clipped to 3
    assert q.dequantize().tolist() == [[-4.0, -1.0, 2.0, 3.0]]
    assert [end.item() for end in format.range_of(q.qparams)] == [-3.5, 3.5]


def test_groups_of_one_sign_have_a_range_that_includes_zero():
    format = IntFormat(4, None, symmetric=False)
    positive = torch.linspace(5, 6, 16)[None]
    assert format.qparams(positive).zero.item() == 0
    assert format.qparams(-positive).zero.item() == format.levels
    low, high = format.ends(positive)
    assert (low.item(), high.item()) == (0.0, 6.0)


def test_the_scale_is_rounded_before_the_codes_are_chosen():
    # 1/3 in float16 is 0.33325195; with that scale 0.49995 is 1.5002 steps (code 2), with 1/3 itself 1.49985 (1).
    format = IntFormat(2, None, symmetric=False)
    weight = torch.tensor([[0.0, 1.0, 0.49995, 0.0]])
    assert format.quantize(weight, format.qparams(weight)).codes.tolist() == [[0, 3, 2, 0]]
    exact = IntFormat(2, None, symmetric=False, scale_dtype=torch.float32)
    assert exact.quantize(weight, exact.qparams(weight)).codes.tolist() == [[0, 3, 1, 0]]


def test_scales_outside_of_float16_are_brought_to_its_ends():
    scale = stored_scale(torch.tensor([0.0, 1e-12, 1.0, 1e9]), torch.float16)
    assert scale.tolist() == [2.0**-24, 2.0**-24, 1.0, FLOAT16.max]
    weight = torch.tensor([[1e9, -1e8, 3.0, 0.0]])  # needs a scale of 1.3e8
    for symmetric in (True, False):
        format = IntFormat(4, None, symmetric)
        qparams = format.qparams(weight)
        assert qparams.scale.item() == FLOAT16.max
        assert not format.fits_scale_dtype(qparams)
        assert format.fits_scale_dtype(format.qparams(weight / 1e6))
        assert torch.equal(format.quantize(weight, qparams).dequantize(), format.fake_quant(weight, qparams))


def inside_and_clipped(symmetric):
    """A weight, a shrunken range at which some of it is clipped at both ends, and where it is not clipped."""
    format = IntFormat(3, 8, symmetric)
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    qparams = format.qparams(weight, 0.55, 0.6)
    steps = (weight.unflatten(1, (2, 8)) / qparams.scale[..., None]).round() + qparams.zero[..., None]
    inside = ((steps >= 0) & (steps <= format.levels)).flatten(1)
    assert 0 < int((~inside).sum()) < inside.numel() // 2
    return format, weight, qparams, inside


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_a_weight_is_1_inside_the_range_and_0_where_it_is_clipped(symmetric):
    format, weight, qparams, inside = inside_and_clipped(symmetric)
    weight.requires_grad_()
    format.fake_quant(weight, qparams).sum().backward()
    # d/dw of (round(w / s) + z - z) * s passes through 1 / s * s: within two roundings of 1, not 1 exactly.
    torch.testing.assert_close(weight.grad, inside.double(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradients_of_scale_and_zero_are_those_of_the_straight_through_estimator(symmetric):
    format, weight, qparams, inside = inside_and_clipped(symmetric)
    scale, zero = qparams.scale.clone().requires_grad_(), qparams.zero.clone().requires_grad_()
    seed = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (format.fake_quant(weight, QParams(scale, zero)) * seed).sum().backward()
    # y = (c - z) s with c = clamp(round(w / s) + z), rounding's derivative being 1:
    # inside dy/ds = round(w / s) - w / s and dy/dz = 0; clipped dy/ds = c - z and dy/dz = -s.
    wide = qparams.scale.repeat_interleave(8, 1)
    offset = qparams.zero.repeat_interleave(8, 1)
    code = ((weight / wide).round() + offset).clamp(0, format.levels)
    by_scale = torch.where(inside, (weight / wide).round() - weight / wide, code - offset)
    by_zero = torch.where(inside, 0.0, -wide)
    torch.testing.assert_close(scale.grad, (by_scale * seed).unflatten(1, (2, 8)).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(zero.grad, (by_zero * seed).unflatten(1, (2, 8)).sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_range_factors_move_the_scale_as_a_smooth_surrogate_does(symmetric):
    """Finite differences of the qparams without any rounding: the straight-through gradient's definition."""
    format = IntFormat(4, 8, symmetric)
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
        qparams = format.qparams(w, low, high)
        return (mix[0] * qparams.scale).sum() + (0 if symmetric else (mix[1] * qparams.zero).sum())

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


@pytest.mark.parametrize(
    ("format", "columns", "bits"),
    [
        (IntFormat(4, 128), 4096, 4 + 16 / 128),
        (IntFormat(4, 128, symmetric=False), 4096, 4 + (16 + 4) / 128),
        (IntFormat(4, None), 4096, 4 + 16 / 4096),
        (IntFormat(3, 64, symmetric=False), 576, 3 + (16 + 3) / 64),
        (IntFormat(2, 16, scale_dtype=torch.float32), 32, 4.0),
        (IntFormat(8, None, symmetric=False), 48, 8.5),
    ],
)
def test_bits_per_value(format, columns, bits):
    assert math.isclose(format.bits_per_value(columns), bits, rel_tol=1e-15)
    weight = torch.randn(6, columns)
    assert format.quantize(weight, format.qparams(weight)).stored_bits == pytest.approx(6 * columns * bits)


def test_a_format_says_what_it_stores():
    format = IntFormat(3, 64, symmetric=False, scale_dtype=torch.bfloat16)
    assert (format.name, format.elements, format.scales) == ("w3g64-asym", Int(3), Plain(torch.bfloat16))
    assert (format.zero, format.independent_ends, format.levels) == ("code", True, 7)
    fixed = IntFormat(8)
    assert (fixed.name, fixed.zero, fixed.independent_ends, fixed.middle) == ("w8-sym", "none", False, 128)
    assert format.with_bits(5) == IntFormat(5, 64, False, torch.bfloat16)


def test_rows_of_a_quantized_weight_keep_their_own_qparams():
    format = IntFormat(4, 16, symmetric=False)
    weight = hard_weight(torch.float32)
    q = format.quantize(weight, format.qparams(weight))
    order = torch.tensor([9, 0, 3])
    assert torch.equal(q.select_rows(order).dequantize(), q.dequantize()[order])
    assert isinstance(q.to("cpu"), QTensor)
    assert q.to("meta").qparams.scale.device.type == "meta"


def test_formats_that_make_no_sense_are_refused():
    for bits in (1, 9):
        with pytest.raises(LowbitError, match=f"{bits} bits given; 2 to 8 are allowed"):
            IntFormat(bits)
    with pytest.raises(LowbitError, match="group size 1 given"):
        IntFormat(4, 1)
    with pytest.raises(LowbitError, match="group size 128 does not divide a width of 576; usable sizes: 16, 32"):
        IntFormat(4, 128).groups(576)
    assert usable_group_sizes(20) == []


def test_a_format_of_another_kind_is_never_taken_for_an_integer_one():
    assert integer(IntFormat(4), "it") == IntFormat(4)
    with pytest.raises(LowbitError, match=r"^a file holds integer formats; ternary given$"):
        integer(Ternary(), "a file")
