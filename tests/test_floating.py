"""Floating-point and two-level formats against other implementations: torch's casts, tables, worked examples."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from lowbit.quant.elements import E2M1, E2M3, E4M3, Float, Table, nearest_of
from lowbit.quant.floating import FLOATS, FP8_BLOCK, FP8_TENSOR, MXFP4, NVFP4
from lowbit.quant.kquants import K_QUANTS
from lowbit.quant.scale_search import search_scales
from lowbit.quant.scales import Integers, PowerOfTwo, shared_exponent, split_scales
from lowbit.quant.tables import IQ4_NL, IQ4_NL_TABLE, Q2_0_TABLE

TABLES = {
    E2M1: [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    E2M3: [i / 8 for i in range(16)] + [2 + i / 4 for i in range(8)] + [4 + i / 2 for i in range(8)],
    E4M3: torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist(),
}


@pytest.mark.parametrize("element", TABLES, ids=lambda element: element.name)
def test_gradients_between_codes_are_the_steps_of_the_table(element: Float) -> None:
    table = torch.tensor(TABLES[element], dtype=torch.float64)
    between = (torch.arange(len(table) - 1) + 0.5 + element.middle).double().requires_grad_()
    values = element.value(between)
    (steps,) = torch.autograd.grad(values.sum(), between)
    assert torch.equal(steps, table.diff())
    at = values.detach().requires_grad_()
    (inverse,) = torch.autograd.grad(element.code(at).sum(), at)
    assert torch.equal(inverse, 1 / table.diff())


@pytest.mark.parametrize("element", TABLES, ids=lambda element: element.name)
def test_codes_are_the_table_in_order(element: Float) -> None:
    positive = torch.tensor(TABLES[element], dtype=torch.float64)
    values = torch.cat([-positive.flip(0)[:-1], positive])
    codes = torch.arange(len(values))
    assert torch.equal(element.value(codes.double()), values)
    assert torch.equal(element.code(values), codes.double())
    assert element.middle == len(positive) - 1
    bits = element.to_bits(codes.to(torch.uint8))
    assert bits[element.middle :].tolist() == list(range(len(positive)))
    assert torch.equal(element.from_bits(bits), codes.to(torch.uint8))
    assert element.from_bits(torch.tensor([1 << (element.bits - 1)], dtype=torch.uint8)) == element.middle  # -0


@pytest.mark.parametrize("element", TABLES, ids=lambda element: element.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_nearest_of_all_values_with_ties_to_even(element: Float, dtype: torch.dtype) -> None:
    positive = torch.tensor(TABLES[element], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.randn(4000, generator=generator) * element.largest / 2,
            torch.randn(4000, generator=generator) * 0.02,
            (positive[1:] + positive[:-1]).float() / 2,  # ties
            -(positive[1:] + positive[:-1]).float() / 2,
            torch.tensor([0.0, -0.0, 1e30, -1e30, element.largest]),
        ]
    ).to(dtype)
    distance = (x.double().abs()[:, None].clamp(max=element.largest) - positive).abs()
    parity = (torch.arange(len(positive)) % 2).double()  # ties go to the even code
    nearest = torch.where(distance == distance.amin(1, keepdim=True), parity, math.inf).argmin(1)
    best = torch.copysign(positive[nearest], x.double())
    assert torch.equal(element.nearest(x).double(), best)


def test_e4m3_is_torchs() -> None:
    x = (torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * 100).clamp(-448, 448)
    theirs = x.to(torch.float8_e4m3fn)
    assert torch.equal(E4M3.nearest(x), theirs.float())
    bits = E4M3.to_bits(E4M3.code(E4M3.nearest(x)).to(torch.uint8))
    assert torch.equal(bits.where(bits != 128, 0), theirs.view(torch.uint8).where(theirs.float() != 0, 0))


def test_gradients_of_rounding() -> None:
    x = torch.tensor([0.1, -0.2, 1.7, 7.0, -9.0], requires_grad=True)
    E2M1.nearest(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 0, 0]
    x = torch.tensor([0.1, -3.0, 200.0], requires_grad=True)
    IQ4_NL.elements.nearest(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0]


def test_nvfp4_by_hand() -> None:
    w = torch.tensor([[0.6, -0.3, 0.1, 0.05, -0.9, 0.45, 0.2, -0.15, 0, 0.75, -0.6, 0.3, 0.12, -0.07, 0.5, -0.4]])
    qparams = NVFP4.qparams(w)
    assert qparams.scale.tolist() == [[320 / 2048]]
    assert shared_exponent([qparams.scale]) == 11
    q = NVFP4.quantize(w, qparams)
    assert E2M1.to_bits(q.codes)[0].tolist() == [6, 12, 1, 1, 15, 5, 3, 10, 0, 6, 14, 4, 2, 9, 5, 13]
    assert q.dequantize()[0, -2:].tolist() == [0.46875, -0.46875]


def test_mxfp4_by_hand() -> None:
    w = torch.zeros(1, 32)
    w[0, :6] = torch.tensor([7, -3.1, 1, 0.3, -0.2, 5])
    qparams = MXFP4.qparams(w)
    assert PowerOfTwo().to_bytes(qparams.scale).tolist() == [[128]]
    assert MXFP4.fake_quant(w, qparams)[0, :7].tolist() == [8, -3, 1, 0, 0, 4, 0]


def test_power_of_two_rule() -> None:
    peaks = torch.tensor([4, 6, 6.9, 7, 7.5, 8])
    assert PowerOfTwo().rule(peaks, E2M1).log2().tolist() == [0, 0, 0, 1, 1, 1]
    extremes = PowerOfTwo().rule(torch.tensor([0.0, 1e-45, 3e38]), E2M1)
    assert bool((extremes > 0).all())
    assert PowerOfTwo().holds(extremes)
    assert torch.equal(PowerOfTwo().from_bytes(PowerOfTwo().to_bytes(extremes)), extremes)


def test_the_gradient_of_a_power_of_two_is_that_of_a_scale_in_proportion_to_the_largest_value() -> None:
    peaks = torch.tensor([0.0, 4.0, 6.0, 7.0, 3e-30], requires_grad=True)
    scale = PowerOfTwo().rule(peaks, E2M1)
    scale.sum().backward()
    assert torch.equal(scale.detach(), PowerOfTwo().rule(peaks.detach(), E2M1))
    assert peaks.grad is not None
    assert peaks.grad.tolist() == [0.0, *(scale / peaks)[1:].tolist()]
    # On scale 1, 2.4 becomes 2: an error of -0.4, which grows with the scale, and so with the largest value.
    w = torch.zeros(1, 32)
    w[0, :2] = torch.tensor([6.9, 2.4])
    w.requires_grad_()
    MXFP4.fake_quant_clipped(w)[0, 1].backward()
    assert w.grad is not None
    assert w.grad[0, :3].tolist() == pytest.approx([(2 - 2.4) / 6.9, 1.0, 0.0])


def test_scales_of_a_tensor_are_one_power_of_two_for_all_that_share_it() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(8, 64, generator=generator) * size for size in (0.02, 1.0, 0.3)]
    peak = torch.stack([w.abs().max() for w in weights]).max()
    alone = [NVFP4.qparams(w) for w in weights]
    together = [NVFP4.qparams(w, tensor_peak=peak) for w in weights]
    exponent = shared_exponent([q.scale for q in together])
    assert exponent is not None
    for w, q in zip(weights, together, strict=True):
        inner = torch.ldexp(q.scale, torch.tensor(exponent))
        assert torch.equal(inner.to(torch.float8_e4m3fn).float(), inner)
        assert float((NVFP4.fake_quant(w, q) - w).norm() / w.norm()) < 0.12
    assert len({shared_exponent([q.scale]) for q in alone}) > 1
    # Every value is a bfloat16 number.
    values = NVFP4.fake_quant(weights[1], together[1])
    assert torch.equal(values.bfloat16().float(), values)


def test_rows_that_share_a_scale() -> None:
    w = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    tiles = FP8_BLOCK.qparams(w).scale
    assert tiles.shape == (300, 2)
    assert all(len(part.unique(dim=0)) == 1 for part in tiles.split(128))
    assert len(tiles.unique(dim=0)) == 3
    assert FP8_TENSOR.qparams(w).scale.unique().numel() == 1
    found = search_scales(w, FP8_BLOCK, FP8_BLOCK.qparams(w))
    assert all(len(part.unique(dim=0)) == 1 for part in found.scale.split(128))


@pytest.mark.parametrize(("rows", "columns"), [(300, 576), (96, 64), (128, 129)])
def test_tiles_at_the_edges_may_be_smaller(rows: int, columns: int) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    w[:, columns - columns % 128 :] *= 0.01
    q = FP8_BLOCK.quantize(w, FP8_BLOCK.qparams(w))
    assert torch.equal(q.dequantize(), FP8_BLOCK.fake_quant(w, q.qparams))
    for top, left in product(range(0, rows, 128), range(0, columns, 128)):
        tile = w[top : top + 128, left : left + 128]
        alone = FP8_BLOCK.fake_quant(tile, FP8_BLOCK.qparams(tile))
        assert torch.equal(q.dequantize()[top : top + 128, left : left + 128], alone)
    every = FP8_BLOCK.per_column(q.qparams, columns)
    assert torch.equal(FP8_BLOCK.value(q.codes.float(), every), q.dequantize())
    for found in (
        search_scales(w, FP8_BLOCK, q.qparams),
        search_scales(w, FP8_BLOCK, q.qparams, torch.ones(columns)),
    ):
        assert float((FP8_BLOCK.fake_quant(w, found) - w).norm()) <= float((q.dequantize() - w).norm())


@pytest.mark.parametrize("name", K_QUANTS)
def test_scales_of_k_quants_are_found_again(name: str) -> None:
    format = K_QUANTS[name]
    w = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    w[1] = 0
    w[2] *= 1e-4
    qparams = search_scales(w, format, format.qparams(w))
    parts = [qparams.scale, qparams.zero] if format.has_minimum else [qparams.scale]
    for products in parts:
        per_block = products.unflatten(-1, (2, -1))
        factor, integers, found = split_scales(per_block, format.scales)
        assert bool(found.all())
        assert torch.equal(factor.half().double(), factor)
        assert float(integers.max()) <= format.scales.largest
        assert torch.equal((factor.float() * integers.float()), per_block)


def test_what_no_factor_gives_is_not_found() -> None:
    assert not Integers(6, 63).holds(torch.tensor([[1.0, math.pi]]))


@pytest.mark.parametrize(
    ("format", "rule", "searched"),
    [(NVFP4, 0.00904, 0.00662), (MXFP4, 0.01256, 0.01246), (K_QUANTS["q4_k"], 0.0062, 0.0050)],
    ids=lambda value: getattr(value, "name", value),
)
def test_errors_on_gaussian_weights(format, rule: float, searched: float) -> None:
    """Mean square errors relative to the weights', from a million values; half a per cent is their spread."""
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    start = format.qparams(w)
    for qparams, most in ((start, rule), (search_scales(w, format, start), searched)):
        assert float((format.fake_quant(w, qparams) - w).square().mean()) < 1.01 * most


def test_a_group_of_zeros_leaves_the_others_their_search() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for zeros in (0, 1):
        weight[:zeros, :32] = 0
        rule = MXFP4.qparams(weight)
        errors = [
            (MXFP4.quantize(weight, qparams).dequantize() - weight)[1:].square().view(63, -1, 32).sum(-1)
            for qparams in (rule, search_scales(weight, MXFP4, rule))
        ]
        better = errors[1] < errors[0]
        assert int(better.sum()) > 4
        lower = search_scales(weight, MXFP4, rule).scale[1:] < rule.scale[1:]
        assert bool((better & lower).any())


def test_importance_weights_the_search() -> None:
    w = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(32)
    importance[:4] = 1000.0
    plain, weighted = (search_scales(w, MXFP4, MXFP4.qparams(w), h) for h in (None, importance))
    errors = [(MXFP4.fake_quant(w, q) - w).square() * importance for q in (plain, weighted)]
    assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())


def test_names() -> None:
    assert set(FLOATS) == {"nvfp4", "mxfp4", "mxfp6", "mxfp8", "fp8", "fp8-tensor", "fp8-block"}


@pytest.mark.parametrize("element", [E2M1, E2M3, E4M3], ids=lambda element: element.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rounding_by_bits_is_rounding_by_exponents(element: Float, dtype: torch.dtype) -> None:
    """Every value of 16 bits; of the wider types random bit patterns, ties, and subnormal values."""
    if dtype.itemsize == 2:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
        x = torch.cat([bits, torch.arange(-(2**16), 2**16) / 64, torch.randn(20_000, generator=generator)]).to(dtype)
    x = x[~x.isnan()]
    clamped = x.clamp(-element.largest, element.largest).double()
    exponent = (torch.frexp(clamped).exponent - 1).clamp(min=element.smallest_exponent)
    exponent = exponent.where(clamped != 0, element.smallest_exponent)
    step = torch.ldexp(torch.ones_like(clamped), exponent - element.mantissa)
    assert element.nearest(x).dtype is dtype
    assert torch.equal(element.nearest(x).double(), (clamped / step).round() * step)
    assert not torch.signbit(element.nearest(x)[element.nearest(x) == 0]).any(), "there is no negative zero"
    assert element.nearest(torch.tensor([torch.nan], dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", [IQ4_NL_TABLE, Q2_0_TABLE, Table((-2.5, 0.1, 7.0))])
def test_what_is_looked_up_in_a_table_is_what_a_search_finds(table, dtype):
    """At every half step, beside it, between, and beyond both ends."""
    steps = torch.arange(-300, 301, dtype=torch.float64) / 2
    random = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 60
    x = torch.cat([steps, steps - 1e-6, steps + 1e-6, random, random / 60]).to(dtype)
    inside = x.clamp(table.values[0], table.values[-1])
    assert torch.equal(table.nearest(x), nearest_of(table.values, inside))
    assert table.nearest(torch.tensor([float("nan")])).shape == (1,)
