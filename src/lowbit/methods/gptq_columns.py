"""The loop over the columns of a weight: each is quantized, and the columns behind it make up for its error.

The rows of a weight do not depend on each other, and the processes of a job share them. A row's bits must not depend
on how many rows are computed together. Operations by element are the same for any of them; a matrix product is not,
since libraries choose their kernels by shape. So products are taken over tiles of rows (``share.tiles``) that are the
same for every number of processes, and each process takes whole tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor

from lowbit.distributed.exchange import fill
from lowbit.distributed.share import parts_of_rows, tiles
from lowbit.distributed.world import here
from lowbit.methods.sparsity import Pattern
from lowbit.quant.format import Format, QParams


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread: the column loop is thousands of small operations, each too short to parallelize.

    Two threads gain little on an idle machine and can be ten times slower on a loaded one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gptq_codes(
    weight: Tensor,
    upper: Tensor,
    order: Tensor,
    qparams: QParams,
    format: Format,
    block_size: int,
    first: Tensor | None = None,
    pattern: Pattern | None = None,
) -> Tensor:
    """Codes ``uint8 (out, in)`` for ``weight``, each column's error compensated by the columns after it.

    The processes of a job share the rows, unless ``pattern`` decides them together.

    Args:
        weight: ``(out, in)``.
        upper: ``inverse_factor`` of the inputs' second moments with rows and columns in ``order``.
        order: the columns in the order in which they are quantized.
        qparams: ``(out, groups)`` each, for columns in natural order.
        format: the weight format.
        block_size: columns per update of the remaining weight.
        first: values ``(out,)`` whose codes the first column gets; its error remains that of ``weight``.
        pattern: which weights become 0, decided as columns are reached; ``block_size`` is a multiple of its own.
    """
    per_column = format.per_column(qparams, weight.shape[1])
    alone = pattern is not None and not pattern.by_row
    parts = [range(len(weight))] if alone else parts_of_rows(len(weight))
    out = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    if own := parts[0 if alone else here().rank]:
        rows = slice(own.start, own.stop)
        scale, zero = (x[rows].T[order].contiguous() for x in per_column)
        start = None if first is None else first[rows]
        with one_thread():
            codes = _codes(weight[rows].T[order].contiguous(), upper, scale, zero, format, block_size, start, pattern)
        out[rows] = torch.empty_like(codes).index_copy_(0, order, codes).T
    if not alone:
        fill(out, parts)
    return out


def _codes(
    columns: Tensor,
    upper: Tensor,
    scale: Tensor,
    zero: Tensor,
    format: Format,
    block_size: int,
    first: Tensor | None,
    pattern: Pattern | None,
) -> Tensor:
    """Codes ``(in, out)`` for columns in the order of ``upper``; a column of the weight is a row here.

    ``columns`` ``(in, out)`` is overwritten; ``scale`` and ``zero`` have its shape.
    """
    codes, kept = torch.empty_like(columns, dtype=torch.uint8), torch.empty(0)
    # A column is a dozen operations, each as short as its call is long: what can be taken apart once for all is.
    qparams, pivots = list(map(QParams, scale.unbind(), zero.unbind())), upper.diagonal().tolist()
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        part, chosen, errors = columns[start:stop], list[Tensor](), list[Tensor]()
        for i, row, factors in zip(count(start), part.unbind(), upper[start:stop, start:stop].unbind(), strict=False):
            at, own = i - start, qparams[i]
            code = format.round(first if first is not None and i == 0 else row, own)
            if pattern is not None:
                if (place := at % pattern.columns) == 0:
                    end = min(i + pattern.columns, stop)
                    kept = pattern.kept(part[at : end - start], upper.diagonal()[i:end])
                code = code.where(kept[place], format.round(torch.zeros_like(row), own))
            error = (row - format.value(code, own)) / pivots[i]
            part[at + 1 :].addr_(factors[at + 1 :], error, alpha=-1)
            chosen.append(code)
            errors.append(error)
        codes[start:stop] = torch.stack(chosen)
        _compensate(columns[stop:], upper[start:stop, stop:], torch.stack(errors))
    return codes


def _compensate(rest: Tensor, upper: Tensor, errors: Tensor) -> None:
    """``rest -= upper^T errors`` in place, tile by tile.

    Args:
        rest: the columns that follow ``(following, out)``.
        upper: their part of the factor ``(block, following)``.
        errors: of the columns before ``(block, out)``.
    """
    if not len(rest):
        return
    for tile in tiles(rest.shape[1]):
        rest[:, tile.start : tile.stop] -= upper.T @ errors[:, tile.start : tile.stop].contiguous()
