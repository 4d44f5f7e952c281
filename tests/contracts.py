"""What every format, runtime op and architecture promises, as functions that take one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.models.runtime_ops import RuntimeOp, parse_tensor_name, tensor_name
from lowbit.quant.format import Format, QParams
from lowbit.quant.scale_search import search_scales
from lowbit.quant.scales import Integers, Plain

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def hard_rows(dtype: torch.dtype, columns: int = 64) -> torch.Tensor:
    """Rows of every kind that real and broken checkpoints hold; each kind stands for a way to go wrong."""
    rows = torch.randn(11, columns, generator=torch.Generator().manual_seed(5))
    rows[1] = rows[1].abs() + 0.5  # all above zero, and far from it
    rows[2] = -rows[2].abs() - 0.5
    rows[3] = 0.37
    rows[4] = 0
    rows[5] *= 1e-9  # below the smallest scale
    rows[6] *= 3e4 / rows[6].abs().max()  # huge, still within float16
    rows[7, : columns // 2] = 0  # one group of zeros beside one that is not
    rows[8, 0] = 40.0
    rows[9] = torch.arange(columns) % 4 - 1.5  # ties
    rows[10, ::2] = -0.0
    return rows.to(dtype)


def extreme_rows(dtype: torch.dtype, columns: int = 64) -> torch.Tensor:
    """Rows at the ends of float32, apart from the others: with a scale for the tensor its small rows are lost."""
    rows = torch.randn(4, columns, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    info = torch.finfo(torch.float32)
    rows[0] *= info.max / 2 / rows[0].abs().max()
    rows[1] = info.max
    rows[2] *= info.smallest_normal / 8  # subnormal numbers
    rows[3] *= info.smallest_normal
    return rows.to(dtype)


COLUMNS = 256  # a superblock of the K-quants


def check_format(format: Format) -> None:
    """One format, in every dtype."""
    wide = (torch.float32, torch.float64)
    for dtype, make in (*((dtype, hard_rows) for dtype in DTYPES), *((dtype, extreme_rows) for dtype in wide)):
        weight = make(dtype, COLUMNS)
        for low, high in ((1.0, 1.0), (0.7, 0.9)):
            qparams = format.qparams(weight, low, high)
            q = format.quantize(weight, qparams)
            assert torch.equal(q.dequantize(), format.fake_quant(weight, qparams)), "simulated is not quantized"
            assert torch.equal(format.fake_quant_clipped(weight, low, high), format.fake_quant(weight, qparams))
            assert bool(q.dequantize().isfinite().all()), "a value is not finite"
            assert q.codes.dtype == torch.uint8
            assert int(q.codes.max()) < 2**format.elements.bits, "a code has more bits than the elements"
            if isinstance(format.scales, Plain):
                assert format.scales.holds(qparams.scale), "not stored"
            if dtype in wide:  # 16 bits cannot hold every product exactly
                _check_stored(format, qparams)
                again = format.quantize(q.dequantize(), qparams)
                assert torch.equal(again.codes, q.codes), "quantizing twice moves codes"
    weight = hard_rows(torch.float64, COLUMNS)
    qparams = format.qparams(weight)
    every = format.per_column(qparams, weight.shape[1])
    assert torch.allclose(format.value(format.position(weight, every), every), weight, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(format.from_range(*format.range_of(qparams)), qparams, strict=True):
        assert torch.equal(ours, theirs), "a range does not give its qparams again"
    _check_gradients(format)
    _check_search(format)
    _check_refusals(format)
    assert format.bits_per_value(COLUMNS) >= format.elements.bits
    assert format.name
    assert hash(format) == hash(type(format)(**vars(format))), "a format is a frozen value"


def _check_stored(format: Format, qparams: QParams) -> None:
    """Scales of several levels are products of what is stored."""
    if isinstance(format.scales, Integers):  # COLUMNS are one superblock
        assert format.scales.holds(qparams.scale), "not stored"
        assert format.zero != "offset" or format.scales.holds(qparams.zero), "not stored"
    else:
        assert format.scales.holds(qparams.scale), "not stored"


def _check_refusals(format: Format) -> None:
    """No code stands for a value that is not finite."""
    for value in (torch.nan, torch.inf, -torch.inf):
        weight = hard_rows(torch.float32, COLUMNS)
        qparams = format.qparams(weight)
        weight[3, 7] = value
        with pytest.raises(LowbitError, match=f"^{format.name}: .*NaN or infinite"):
            format.quantize(weight, qparams)


def _check_search(format: Format) -> None:
    """Neighbours can be stored, and a search never makes a group worse."""
    weight = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(3))
    start = format.qparams(weight)
    found = search_scales(weight, format, start)
    for candidate in (*format.neighbours(start), found):
        _check_stored(format, candidate)
    errors = [
        format.over_shared_rows(
            (format.fake_quant(weight, q) - weight).square().unflatten(-1, (q.scale.shape[-1], -1)).sum(-1)
        )
        for q in (start, found)
    ]
    assert bool((errors[1] <= errors[0]).all())
    if format.elements.bits <= 6:  # at 7 and 8 bits the whole range is the best one
        assert float(errors[1].sum()) < float(errors[0].sum())


def _check_gradients(format: Format) -> None:
    weight = hard_rows(torch.float32, COLUMNS)[:1].requires_grad_()
    groups = format.groups(COLUMNS)
    low, high = (torch.full((1, groups), 0.8, requires_grad=True) for _ in range(2))
    format.fake_quant_clipped(weight, low, high).square().sum().backward()
    for leaf in (weight, low, high) if format.learns_range else (weight,):
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0


def check_op(op: RuntimeOp, width: int) -> None:
    """One runtime op for ``width`` channels."""
    stored = op.to_tensors()
    again = type(op).from_tensors(stored, width)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), op(x)), "what is stored computes something else"
    assert op(x).shape == x.shape
    assert op(x.double()).dtype == torch.float64
    assert op.bits == sum(8 * value.numel() * value.element_size() for value in stored.values())
    assert op.macs >= 0
    assert op.kind
    assert op.why
    for name in stored:
        module = "model.layers.0.norm"
        assert parse_tensor_name(tensor_name(module, op, name)) == (module, op.kind, name)
    with pytest.raises(ValueError, match=r"."):
        type(op).from_tensors({}, width)
    with pytest.raises(ValueError, match=r"."):
        type(op).from_tensors({name: value[..., :1] for name, value in stored.items()}, width)


def check_architecture(model: Any, random_maps: Any, in_float32: bool = False) -> None:
    """A tiny model: blocks equal the model, and for each kind of layer every linear is listed, every edge holds.

    ``in_float32`` says that the library's layers compute in float32 whatever they are given.
    """
    from lowbit.models.forward import run_all
    from tiny import block_of, params_of, skeleton_of, tiny_ids

    skeleton, ids = skeleton_of(model), tiny_ids()
    x = skeleton.embed(ids)
    for index in range(len(skeleton.layers)):
        x = run_all(skeleton.block(index, params_of(model, skeleton, index)), x)
    with torch.no_grad():
        assert torch.equal(skeleton.logits(ids, x), model(ids, use_cache=False).logits)
    for kind, layers in skeleton.architecture.kinds().items():
        check_kind(kind, *block_of(model, start=layers[-1], dtype=torch.float64), random_maps, in_float32)


def check_kind(kind: Any, block: Any, x: torch.Tensor, random_maps: Any, in_float32: bool) -> None:
    """A layer in float64: its linears are those listed, and random maps across its edges leave its output."""
    from transformers.pytorch_utils import Conv1D

    from lowbit.models.equivalence import move
    from lowbit.models.forward import run

    listed = [name.partition(".")[2] for name in block.linears()]
    modules = block.layers[0].named_modules()
    assert sorted(listed) == sorted(name for name, m in modules if isinstance(m, torch.nn.Linear | Conv1D))
    order: list[str] = []
    run(block, x, taps={name: lambda value, name=name: order.append(name) for name in block.linears()})
    order = list(dict.fromkeys(order))  # one may be called twice
    places = [[order.index(name) for name in group] for group in block.linear_groups()]
    assert sorted(order) == sorted(block.linears())
    assert all(own == sorted(own) for own in places)
    # A group is where its first linear is: o of a parallel block runs between up and q, which read one tensor.
    assert [own[0] for own in places] == sorted(own[0] for own in places)
    wanted = run(block, x)
    generator = torch.Generator().manual_seed(0)
    assert {edge.kind for edge in kind.edges} == {edge.kind for edge in block.edges()}
    for edge in block.edges():
        for map in random_maps(edge, generator):
            params = move(block, edge, map)
            got = run(block, x, params)
            changed = [name for name, value in params.items() if not torch.equal(value, block.params[name])]
            assert len(changed) >= len({edge.src.module, *(dst.module for dst in edge.dst)})
            # Gemma's norms compute their gain in float32 inside the library
            close = 1e-4 if in_float32 or any(edge.offset for edge in block.edges()) else 1e-10
            assert float((got - wanted).abs().max() / wanted.abs().max()) < close, edge
            one_side = {**params, edge.src.parameter: block.params[edge.src.parameter]}
            if {dst.module for dst in edge.dst} != {edge.src.module}:
                assert float((run(block, x, one_side) - wanted).abs().max() / wanted.abs().max()) > 10 * close, edge
