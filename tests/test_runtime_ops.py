"""Runtime operations as values: what they compute, what they cost, and the way to a file and back."""

from __future__ import annotations

import math

import pytest
import torch

from contracts import check_op
from lowbit.errors import LowbitError
from lowbit.models.diagonal_blocks import DiagonalBlocks
from lowbit.models.fixed_hadamard import FixedHadamard
from lowbit.models.hadamard import Hadamard, factor_sizes, random_flips, times_hadamard
from lowbit.models.kronecker import Kronecker, times_kronecker
from lowbit.models.ops import OPS
from lowbit.models.outlier_columns import OutlierColumns
from lowbit.models.reorder import Reorder
from lowbit.models.runtime_ops import (
    PREFIX,
    Clip,
    Gather,
    Matrix,
    RuntimeOp,
    at_input,
    linear_behind,
    parse_tensor_name,
    tensor_name,
)
from lowbit.quant.activations import IntTokens
from lowbit.quant.integer import IntFormat
from lowbit.quant.runtimes import RuntimeInput

WIDTH = 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# With the bits that each takes and the operations that it costs for a token, counted by hand.
CASES: dict[str, tuple[RuntimeOp, int, int]] = {
    "matrix": (Matrix(draw(WIDTH, WIDTH)), 8 * 8 * 32, 64),
    "gather": (Gather(torch.tensor([5, 1, 5, 3, 4, 5, 6, 0]), draw(WIDTH)), 2 * 8 * 32, 8),
    "merging gather": (
        Gather(torch.tensor([5, 1, 5, 3, 4, 5, 6, 7]), draw(WIDTH), torch.tensor([7, -1, 7, -1, -1, -1, -1, -1])),
        3 * 8 * 32,
        8,
    ),
    "reorder": (Reorder(torch.tensor([5, 1, 2, 7, 4, 3, 6, 0])), 8 * 32, 0),
    # One step of three butterflies, and the signs.
    "hadamard": (Hadamard(torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]], dtype=torch.uint8)), 8 * 8, 8 + 8 * 8),
    "hadamard in blocks": (
        Hadamard(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.uint8)),
        8 * 8,
        8 + 8 * 4,
    ),
    # One step of two butterflies.
    "fixed hadamard": (FixedHadamard(torch.tensor([4, 4], dtype=torch.int32)), 2 * 32, 8 * 4),
    "kronecker": (Kronecker(draw(2, 2), draw(4, 4, seed=3)), (4 + 16) * 32, 8 * (2 + 4)),
    "blocks": (DiagonalBlocks(draw(4, 2, 2)), 4 * 4 * 32, 16),
    "outlier columns": (
        OutlierColumns(torch.tensor([0, 1, 0, 0, 1, 0, 0, 0], dtype=torch.uint8), draw(3, 2).half()),
        8 * 8 + 3 * 2 * 16,
        6,
    ),
    "clip": (Clip(torch.tensor([0.7, 0.9])), 2 * 32, 0),
    "clip with offsets": (Clip(torch.tensor([0.7, 0.9]), 0.3 * draw(WIDTH)), 10 * 32, 8),
}
each = pytest.mark.parametrize(("op", "bits", "macs"), CASES.values(), ids=CASES)


def test_every_kind_has_a_case():
    assert {type(op) for op, _, _ in CASES.values()} == set(OPS.values())
    assert all(op.kind == kind for kind, op in OPS.items())


@each
def test_an_op_keeps_the_contract(op, bits, macs):
    check_op(op, WIDTH)


@each
def test_an_op_survives_its_tensors(op, bits, macs):
    stored = op.to_tensors()
    back = type(op).from_tensors(stored, WIDTH)
    assert type(back) is type(op)
    for name in op.fields():
        ours, theirs = getattr(op, name), getattr(back, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)
    x, format = draw(2, 5, WIDTH, seed=1), IntTokens(4, symmetric=False)
    assert torch.equal(back(x, format), op(x, format))
    for value in stored.values():
        assert value.is_contiguous()
        assert value.dtype in (torch.float32, torch.float16, torch.int32, torch.uint8)
    assert torch.equal(op.to("cpu")(x, format), op(x, format))


@each
def test_the_bits_are_those_of_the_tensors_that_are_stored(op, bits, macs):
    assert op.bits == bits
    assert sum(value.numel() * value.element_size() * 8 for value in op.to_tensors().values()) == bits
    assert op.macs == macs
    assert op.width == (0 if op.kind == "clip" and op.offset is None else WIDTH)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_op_keeps_the_shape_and_the_dtype(op, bits, macs, dtype):
    x = draw(2, 5, WIDTH, seed=1).to(dtype)
    for shaped in (x, x[0, 0], x[None]):
        got = op(shaped, IntTokens(8, symmetric=False))
        assert got.shape == shaped.shape
        assert got.dtype == dtype
        assert not torch.equal(got, shaped)


@each
def test_an_op_computes_what_a_literal_loop_computes(op, bits, macs):
    """One token at a time, one channel at a time, in Python's double precision."""
    x, format = draw(5, WIDTH, seed=1), IntTokens(4, symmetric=False)
    got = op(x, format)
    for row, token in zip(got, x.tolist(), strict=True):
        assert row.tolist() == pytest.approx(_literal(op, token), rel=1e-5, abs=1e-5)


def _literal(op: RuntimeOp, x: list[float]) -> list[float]:
    if isinstance(op, Matrix):
        return [sum(x[i] * float(op.matrix[i, j]) for i in range(WIDTH)) for j in range(WIDTH)]
    if isinstance(op, Gather):
        merged = [x[int(i)] for i in op.idx]
        for old, new in enumerate([] if op.into is None else op.into.tolist()):
            if new >= 0:
                merged[new] += x[old]
        return [value * float(factor) for value, factor in zip(merged, op.factor, strict=True)]
    if isinstance(op, Reorder):
        return [x[int(i)] for i in op.idx]
    if isinstance(op, Hadamard):
        n = op.flips.shape[1]
        flipped = [-value if flip else value for value, flip in zip(x, op.flips.flatten().tolist(), strict=True)]
        parts = [flipped[start : start + n] for start in range(0, WIDTH, n)]
        return [
            sum(value * (-1) ** (i & j).bit_count() for i, value in enumerate(part)) / n**0.5
            for part in parts
            for j in range(n)
        ]
    if isinstance(op, FixedHadamard):
        parts = [x[start : start + 4] for start in (0, 4)]
        return [sum(v * (-1) ** (i & j).bit_count() for i, v in enumerate(p)) / 2 for p in parts for j in range(4)]
    if isinstance(op, Kronecker):
        b = len(op.right)
        return [
            sum(x[i] * float(op.left[i // b, j // b]) * float(op.right[i % b, j % b]) for i in range(WIDTH))
            for j in range(WIDTH)
        ]
    if isinstance(op, DiagonalBlocks):
        size = op.blocks.shape[1]
        return [
            sum(x[start + i] * float(block[i, j]) for i in range(size))
            for start, block in zip(range(0, WIDTH, size), op.blocks, strict=True)
            for j in range(size)
        ]
    if isinstance(op, OutlierColumns):
        rest = [0.0 if kept else value for kept, value in zip(op.kept.tolist(), x, strict=True)]
        rounded = _literal(Clip(torch.ones(2)), rest)
        return [value if kept else near for kept, value, near in zip(op.kept.tolist(), x, rounded, strict=True)]
    assert isinstance(op, Clip)
    low, high = min(0.0, *x) * float(op.ratios[0]), max(0.0, *x) * float(op.ratios[1])
    scale = (high - low) / 15
    zero = round(-8 - low / scale)
    shifts = [0.0] * WIDTH if op.offset is None else op.offset.tolist()
    codes = [round(min(7, max(-8, value / scale + shift + zero))) for value, shift in zip(x, shifts, strict=True)]
    return [(code - zero) * scale for code in codes]


def test_worked_values():
    x = torch.tensor([2.0, 4.0, 5.0, 8.0])
    assert Matrix(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))(torch.tensor([3.0, 5.0])).tolist() == [5.0, 6.0]
    assert Gather(torch.tensor([3, 3, 1, 0]), torch.tensor([0.5, 0.5, 1.0, 1.0]))(x).tolist() == [4.0, 4.0, 4.0, 2.0]
    assert Reorder(torch.tensor([3, 1, 0, 2]))(x).tolist() == [8.0, 4.0, 2.0, 5.0]
    # Symmetric at 4 bits, absmax 8 clipped to 7.5: a step is 1, and 8 ends at code 7.
    clip, format = Clip(torch.tensor([1.0, 0.9375]), torch.tensor([0.0, 0.6, 0.0, 0.0])), IntTokens(4, symmetric=True)
    assert clip(x, format).tolist() == [2.0, 5.0, 5.0, 7.0]


def test_a_clip_needs_a_range_that_it_can_change():
    clip, x = CASES["clip"][0], draw(3, WIDTH)
    assert clip(x) is x
    with pytest.raises(LowbitError, match="dynamic integer inputs only; ") as caught:
        clip(x, RuntimeInput("llama.cpp", IntFormat(4, 32)))
    assert "llama.cpp" in str(caught.value)


@pytest.mark.parametrize("name", ["matrix", "kronecker", "blocks", "clip", "clip with offsets"])
def test_gradients_reach_what_is_learned(name):
    op, (kind, *_) = CASES[name][0], [type(CASES[name][0])]
    leaves = [getattr(op, field) for field in op.fields()]
    leaves = [None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves]
    kind(*leaves)(draw(5, WIDTH, seed=1), IntTokens(4, symmetric=False)).square().sum().backward()
    for leaf in leaves:
        assert leaf is None or bool((leaf.grad != 0).any())
    assert all(not value.requires_grad for value in kind(*leaves).to_tensors().values())


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("matrix", {"matrix": torch.ones(8, 7)}, r"\(8, 7\)\}; \{'matrix': \(8, 8\)\} is expected"),
        ("matrix", {"matrix": torch.ones(8)}, "is expected"),
        ("matrix", {"more": torch.ones(8)}, "is expected"),
        ("matrix", {"matrix": None}, "is expected"),
        ("gather", {"idx": torch.zeros(7, dtype=torch.int32)}, "is expected"),
        ("gather", {"factor": torch.ones(8, 1)}, "is expected"),
        ("gather", {"factor": None}, "is expected"),
        ("gather", {"into": torch.zeros(3, dtype=torch.int32)}, "is expected"),
        ("gather", {"idx": torch.full((8,), 8, dtype=torch.int32)}, "has channel indices out of range"),
        ("gather", {"idx": torch.full((8,), -1, dtype=torch.int32)}, "has channel indices out of range"),
        ("gather", {"into": torch.full((8,), 8, dtype=torch.int32)}, "has channel indices out of range"),
        ("gather", {"into": torch.full((8,), -2, dtype=torch.int32)}, "has channel indices out of range"),
        ("reorder", {"idx": torch.zeros(8, dtype=torch.int32)}, "has a channel twice or none of it"),
        ("reorder", {"idx": torch.arange(1, 9, dtype=torch.int32)}, "has a channel twice or none of it"),
        ("reorder", {"idx": torch.arange(7, dtype=torch.int32)}, "is expected"),
        ("hadamard", {"flips": torch.zeros(1, 7, dtype=torch.uint8)}, "is expected"),
        ("hadamard", {"flips": torch.zeros(8, dtype=torch.uint8)}, "blocks that do not divide 8 channels"),
        ("hadamard", {"flips": torch.zeros(3, 8, dtype=torch.uint8)}, "blocks that do not divide 8 channels"),
        ("hadamard", {"flips": torch.full((1, 8), 2, dtype=torch.uint8)}, "other than 0 and 1"),
        ("hadamard", {"flips": torch.zeros(1, 8)}, "other than 0 and 1"),
        ("hadamard", {"flips": None}, "do not divide"),
        ("fixed hadamard", {"sizes": torch.tensor([4, 2], dtype=torch.int32)}, "no equal powers of two"),
        ("fixed hadamard", {"sizes": torch.tensor([4], dtype=torch.int32)}, "no equal powers of two"),
        ("fixed hadamard", {"sizes": torch.tensor([4.0, 4.0])}, "no equal powers of two"),
        ("fixed hadamard", {"sizes": torch.ones(2, 2, dtype=torch.int32)}, "is expected"),
        ("fixed hadamard", {"sizes": None}, "is expected"),
        ("kronecker", {"left": torch.ones(3, 3)}, "factors that do not multiply to 8 channels"),
        ("kronecker", {"right": torch.ones(3, 3)}, "is expected"),
        ("kronecker", {"right": None}, "is expected"),
        ("kronecker", {"left": torch.ones(2)}, "do not multiply"),
        ("blocks", {"blocks": torch.ones(3, 2, 2)}, "do not divide 8 channels"),
        ("blocks", {"blocks": torch.ones(4, 2, 3)}, "is expected"),
        ("blocks", {"blocks": torch.ones(8, 1)}, "do not divide"),
        ("outlier columns", {"kept": torch.ones(7, dtype=torch.uint8)}, "is expected"),
        ("outlier columns", {"kept": torch.full((8,), 2, dtype=torch.uint8)}, "is expected"),
        (
            "outlier columns",
            {"kept": torch.tensor([0, 2, 0, 0, 1, 0, 0, 0], dtype=torch.uint8)},
            "other than 0 and 1",
        ),
        ("outlier columns", {"kept": torch.tensor([0.0, 1, 0, 0, 1, 0, 0, 0])}, "other than 0 and 1"),
        ("outlier columns", {"columns": torch.ones(3, 1)}, "is expected"),
        ("outlier columns", {"columns": torch.ones(6)}, "is expected"),
        ("outlier columns", {"columns": None}, "is expected"),
        ("clip", {"ratios": torch.ones(3)}, "is expected"),
        ("clip", {"offset": torch.ones(7)}, "is expected"),
        ("clip", {"ratios": None}, "is expected"),
    ],
)
def test_tensors_that_are_no_such_op_are_refused(kind, change, message):
    stored = {name: value for name, value in (CASES[kind][0].to_tensors() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        type(CASES[kind][0]).from_tensors(stored, WIDTH)
    with pytest.raises(ValueError, match="is expected"):
        OPS["matrix"].from_tensors(CASES["matrix"][0].to_tensors(), WIDTH + 1)


def test_names_in_files():
    op = CASES["merging gather"][0]
    names = [tensor_name("model.layers.3.input_layernorm", op, key) for key in op.to_tensors()]
    assert names == [f"model.layers.3.input_layernorm.runtime.gather.{key}" for key in ("idx", "factor", "into")]
    assert [parse_tensor_name(name) for name in names] == [
        ("model.layers.3.input_layernorm", "gather", key) for key in ("idx", "factor", "into")
    ]
    assert tensor_name("a", Clip, "ratios") == "a.runtime.clip.ratios"
    # A kind that nobody knows has a name all the same: it is read, so that it can be refused.
    assert parse_tensor_name(f"a.{PREFIX}.rotation.angles") == ("a", "rotation", "angles")
    for other in ("model.layers.3.mlp.up_proj.weight", "a.runtime", "a.runtime.gather", "runtime.gather.idx", ""):
        assert parse_tensor_name(other) is None


def test_outlier_columns_take_their_place_in_the_weight_and_nowhere_else():
    op = CASES["outlier columns"][0]
    codes = draw(3, WIDTH, seed=2)
    weight = op.weight(codes)
    assert torch.equal(weight[:, [1, 4]], op.columns.float())
    assert torch.equal(weight[:, [0, 2, 3, 5, 6, 7]], codes[:, [0, 2, 3, 5, 6, 7]])
    others = [other for name, (other, _, _) in CASES.items() if name != "outlier columns"]
    assert all(other.weight(codes) is codes for other in others)
    x = draw(5, WIDTH, seed=1)
    assert op(x) is x  # float inputs stay


def test_outliers_do_not_widen_the_range_of_the_others():
    op, format = CASES["outlier columns"][0], IntTokens(4, symmetric=False)
    x = draw(5, WIDTH, seed=1)
    x[:, 1] *= 1000
    rest = x.clone()
    rest[:, [1, 4]] = 0
    wanted = format.fake_quant(rest)
    wanted[:, [1, 4]] = x[:, [1, 4]]
    assert torch.equal(op(x, format), wanted)


def literal_hadamard(n: int) -> torch.Tensor:
    """``H_n`` entry by entry in float64: parities of the bits of two indices, times a Hartley matrix."""
    twos = (n & -n).bit_length() - 1
    m = n >> twos

    def entry(i: int, j: int) -> float:
        sign = (-1) ** ((i // m) & (j // m)).bit_count()
        angle = 2 * math.pi * (i % m) * (j % m) / m
        return sign * (math.cos(angle) + math.sin(angle)) / math.sqrt(n)

    return torch.tensor([[entry(i, j) for j in range(n)] for i in range(n)], dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 9, 45, 64, 96, 128, 144, 192, 256])
def test_the_fast_transform_is_the_matrix_that_its_page_defines(n):
    matrix = literal_hadamard(n)
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix, matrix.T, atol=1e-12)
    assert float(matrix.abs().max()) <= (2 / n) ** 0.5 + 1e-12
    x = draw(3, 2, n).double()
    fast = times_hadamard(x)
    assert torch.allclose(fast, x @ matrix, rtol=1e-12, atol=1e-12)
    assert torch.allclose(times_hadamard(fast), x, rtol=1e-12, atol=1e-12)
    assert math.prod(factor_sizes(n)) == n


@pytest.mark.parametrize("sizes", [(2, 3, 4), (5,), (1, 6), (4, 1, 2)])
def test_a_product_with_several_factors_is_that_with_their_kronecker_product(sizes):
    factors = [draw(size, size, seed=size).double() for size in sizes]
    whole = factors[0]
    for factor in factors[1:]:
        whole = torch.kron(whole, factor)
    x = draw(2, 3, len(whole)).double()
    assert torch.allclose(times_kronecker(x, factors), x @ whole, rtol=1e-12, atol=1e-12)
    assert times_kronecker(x[:0], factors).shape == (0, 3, len(whole))


def test_sixteen_bits_are_summed_in_thirty_two():
    """One rounding, of the result: products in bfloat16 would be off by several units in the last place."""
    for op in (CASES["hadamard"][0], CASES["kronecker"][0], CASES["blocks"][0]):
        x = draw(64, WIDTH, seed=1).bfloat16()
        assert torch.equal(op(x), op(x.float()).bfloat16())


def test_an_op_on_an_input_has_a_name_that_no_module_has():
    name = at_input("7.mlp.down_proj")
    assert linear_behind(name) == "7.mlp.down_proj"
    assert linear_behind("7.mlp.down_proj") is None
    stored = tensor_name(f"model.layers.{name}", Hadamard, "flips")
    assert parse_tensor_name(stored) == (f"model.layers.{name}", "hadamard", "flips")
    assert {kind for kind, op in OPS.items() if op.on_inputs} == {
        "matrix", "hadamard", "fixed-hadamard", "kronecker", "blocks"
    }  # fmt: skip


def test_signs_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = random_flips(2, 64, 5)
    torch.manual_seed(2)
    assert torch.equal(random_flips(2, 64, 5), first)
    assert not torch.equal(random_flips(2, 64, 6), first)
    assert 40 < int(first.sum()) < 88  # 128 fair coins: within four standard deviations of half
