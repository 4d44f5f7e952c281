"""Work that processes divide: the bits do not depend on how, and the fast forms are the naive ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.distributed import share
from lowbit.distributed.share import each, own_items, parts_of_rows, tiles
from lowbit.distributed.world import World, here, within
from lowbit.methods import awq, gptq_columns
from lowbit.methods.awq import AWQ
from lowbit.methods.gptq import inverse_factor
from lowbit.methods.gptq_columns import gptq_codes
from lowbit.methods.sparsity import OfEach, Pattern, Share
from lowbit.methods.triangular import WIDTH, inverse_of_upper
from lowbit.quant.format import Format, QParams
from lowbit.quant.integer import IntFormat

SIZES = (1, 2, 3, 5)


def problem(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=dtype), (x.T @ x).to(dtype)


def by_columns(weight: torch.Tensor, upper: torch.Tensor, order: torch.Tensor, format: Format) -> torch.Tensor:
    """Codes of one row after the other, each column's error compensated at once."""
    qparams = format.per_column(format.qparams(weight), weight.shape[1])
    left, codes = weight[:, order].clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for i, column in enumerate(order.tolist()):
        own = QParams(qparams.scale[:, column], qparams.zero[:, column])
        code = format.round(left[:, i], own)
        codes[:, column] = code.to(torch.uint8)
        error = (left[:, i] - format.value(code, own)) / upper[i, i]
        left -= error[:, None] * upper[i]
    return codes


@pytest.mark.parametrize("rows", [20, 64, 130, 200])
def test_codes_of_rows_are_those_of_the_naive_loop(rows):
    weight, gram = problem(rows, 160, torch.float64)
    format, order = IntFormat(4, 32, symmetric=False), torch.arange(160).flip(0)
    upper, _ = inverse_factor(gram[order][:, order], 0.01)
    found = gptq_codes(weight, upper, order, format.qparams(weight), format, 48)
    assert torch.equal(found, by_columns(weight, upper, order, format))


@pytest.mark.parametrize("pattern", [None, OfEach(2, 4), Share(0.5, 32)])
@pytest.mark.parametrize("rows", [70, 200, 331])
def test_rows_have_the_same_codes_in_any_number_of_processes(rows, pattern, monkeypatch):
    weight, gram = problem(rows, 160)
    format, order = IntFormat(3, 32), torch.randperm(160, generator=torch.Generator().manual_seed(1))
    upper, _ = inverse_factor(gram[order][:, order], 0.01)
    first = weight[:, order[0]] + 0.1

    def codes() -> torch.Tensor:
        return gptq_codes(weight, upper, order, format.qparams(weight), format, 32, first, pattern)

    whole, parts_of = codes(), []
    monkeypatch.setattr(gptq_columns, "fill", lambda out, parts: parts_of.append(parts[here().rank]))
    for size in SIZES:
        found = torch.zeros_like(whole)
        for rank in range(size):
            parts_of.clear()
            with within(World(rank, size)):
                own = codes()
            part = parts_of[0] if parts_of else range(rows)  # a pattern over all rows is computed by everyone
            found[part.start : part.stop] = own[part.start : part.stop]
        assert torch.equal(found, whole), size
    assert by_row(pattern) == bool(parts_of)


def by_row(pattern: Pattern | None) -> bool:
    return pattern is None or pattern.by_row


def test_tiles_and_parts_are_all_rows():
    for rows in (1, 63, 64, 127, 128, 1000):
        assert [row for tile in tiles(rows) for row in tile] == list(range(rows))
        for size in SIZES:
            with within(World(0, size)):
                parts = parts_of_rows(rows)
            assert len(parts) == size
            assert [row for part in parts for row in part] == list(range(rows))
            assert all(part.start % 64 == 0 for part in parts)
    with within(World(0, 2)):
        assert parts_of_rows(576) == [range(320), range(320, 576)]


def test_a_triangular_inverse_is_that_of_a_solve_with_the_identity():
    for size in (1, WIDTH, WIDTH + 1, 2 * WIDTH + 40):
        generator = torch.Generator().manual_seed(size)
        upper = torch.randn(size, size, generator=generator, dtype=torch.float64).triu() / size
        upper += 2 * torch.eye(size)
        eye = torch.eye(size, dtype=torch.float64)
        naive, found = torch.linalg.solve_triangular(upper, eye, upper=True), inverse_of_upper(upper)
        assert torch.equal(found, found.triu())
        # Both solve rows of up to ``size`` terms of order one in float64.
        assert torch.allclose(found, naive, rtol=1e-12, atol=1e-13)


def test_each_item_is_computed_once_and_alone(monkeypatch):
    done: list[tuple[int, int]] = []

    def compute(item: int) -> float:
        assert here().size == 1
        return item / 3

    monkeypatch.setattr(share, "from_everyone", lambda value: [value])
    for size in SIZES:
        found = []
        for rank in range(size):
            with within(World(rank, size)):
                found += each(range(7), compute)
                done.append((size, len(own_items(range(7)))))
        assert found == [item / 3 for item in range(7)]
    assert sum(count for size, count in done if size == 3) == 7


@pytest.mark.parametrize("size", SIZES[1:])
def test_clipping_ratios_do_not_depend_on_who_tries_them(size, monkeypatch):
    weight, gram = problem(12, 64)
    format, options = IntFormat(3, 16), AWQ(clip_grid=20)
    whole = options._best_clip(weight, gram, format)
    assert len(whole.unique()) > 2
    sent: list[list[torch.Tensor]] = []

    def told(data, tensors):
        sent.append(list(tensors))
        return []

    with monkeypatch.context() as patch:
        patch.setattr(awq, "with_tensors", told)
        for rank in range(size):
            with within(World(rank, size)):
                options._best_clip(weight, gram, format)
    monkeypatch.setattr(awq, "with_tensors", lambda data, tensors: [(None, one) for one in sent])
    with within(World(0, size)):
        assert torch.equal(options._best_clip(weight, gram, format), whole)


def test_more_processes_than_ratios(monkeypatch):
    weight, gram = problem(4, 16)
    one = replace(AWQ(), clip_least=1.0)
    with within(World(1, 2)), monkeypatch.context() as patch:
        patch.setattr(awq, "with_tensors", lambda data, tensors: [(None, tensors)])
        assert torch.equal(one._best_clip(weight, gram, IntFormat(4, 16)), torch.ones(4, 1))
