"""Formats as GGUF blocks, read back by the gguf package; by a loop over bytes where that lacks the type."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.quants import dequantize

import lowbit
from contracts import COLUMNS, extreme_rows, hard_rows
from lowbit.checkpoints.gguf_types import SIZES, OwnKind, Reader, values_of
from lowbit.checkpoints.resolve import resolve
from lowbit.exporters.gguf_blocks import pack_blocks
from lowbit.exporters.gguf_limits import type_of
from lowbit.exporters.gguf_native import NATIVE, native_type, pack_native
from lowbit.quant.floating import FLOATS, NVFP4
from lowbit.quant.format import Format, QTensor
from lowbit.quant.formats import FORMATS as KINDS
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import K_QUANTS
from lowbit.quant.scale_search import search_scales
from lowbit.quant.scales import shared_exponent
from lowbit.quant.scheme_names import WEIGHTS as FORMATS
from lowbit.quant.tables import Q2_0
from tiny import save_tiny, tiny_tokenizer

GROUPS = (32, 256, None)
ALL = {format.name: format for kind in KINDS.values() for format in kind.examples()}
ALL |= {f.name: f for bits in range(2, 9) for g in GROUPS for sym in (False, True) for f in [IntFormat(bits, g, sym)]}
WITHOUT = {"w8g32-asym", "w8g256-asym", "w8-asym"}
AS_FLOATS = {"mxfp6", "mxfp8", "fp8", "fp8-tensor", "fp8-block"}  # test_gguf_floats.py


def by_hand(blocks: np.ndarray) -> torch.Tensor:
    """Q2_0 as llama.cpp's header describes it, one value at a time."""
    rows = []
    for row in blocks:
        values = []
        for start in range(0, len(row), 18):
            (scale,) = struct.unpack("<e", bytes(row[start : start + 2]))
            packed = row[start + 2 : start + 18]
            values += [((int(packed[j // 4]) >> j % 4 * 2 & 3) - 1) * scale for j in range(64)]
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float32)


def read_back(q: QTensor) -> torch.Tensor:
    """The values of a weight that was written as blocks, by another's decoder."""
    kind = type_of(q.format, q.codes.shape[1])
    if isinstance(q.format, IntFormat):
        return torch.from_numpy(np.array(dequantize(pack_blocks(q, kind), kind)))
    exponent = shared_exponent([q.qparams.scale]) if q.format is NVFP4 else 0
    assert exponent is not None
    blocks = pack_native(q, exponent)
    size, count = SIZES[kind]
    assert blocks.dtype == np.uint8
    assert blocks.shape == (len(q.codes), q.codes.shape[1] // size * count)
    if isinstance(kind, OwnKind):
        assert np.array_equal(values_of(blocks, kind), by_hand(blocks).numpy())
        return by_hand(blocks)
    return torch.from_numpy(np.array(dequantize(blocks, kind))) * 2.0**-exponent


def test_which_formats_have_no_type() -> None:
    types = {name: type_of(format, COLUMNS) for name, format in ALL.items()}
    assert {name for name, kind in types.items() if isinstance(kind, str)} == WITHOUT
    assert {name for name, kind in types.items() if kind is None} == AS_FLOATS


@pytest.mark.parametrize("rows", [hard_rows, extreme_rows], ids=lambda rows: rows.__name__)
@pytest.mark.parametrize("format", [f for n, f in ALL.items() if n not in WITHOUT | AS_FLOATS], ids=lambda f: f.name)
def test_rows_of_every_kind_in_every_format_that_has_a_type(format: Format, rows: object) -> None:
    """Random, subnormal, all-zero, all-equal, huge and tiny rows."""
    assert callable(rows)
    weight = rows(torch.float32, COLUMNS)
    q = format.quantize(weight, format.qparams(weight))
    assert torch.equal(read_back(q), q.dequantize())


@pytest.mark.parametrize("searched", [False, True], ids=["rule", "searched"])
@pytest.mark.parametrize("name", NATIVE)
def test_the_package_reads_every_value(name: str, searched: bool) -> None:
    format = FORMATS[name]
    w = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    w[1] = 0
    w[2, 256:] = 0
    w[3] *= 1e-5
    w[4] *= 1e3
    w[5] = w[5].abs()
    qparams = format.qparams(w)
    if searched:
        qparams = search_scales(w, format, qparams)
    q = format.quantize(w, qparams)
    assert torch.equal(read_back(q), q.dequantize())


def test_widths_and_other_formats() -> None:
    assert native_type(IntFormat(4, 32), 512) is None
    assert native_type(FLOATS["fp8"], 512) is None
    assert native_type(K_QUANTS["q4_k"], 576) == "rows of 576 are not a multiple of 256, the width of its blocks"


def test_worked_examples() -> None:
    w = torch.tensor([[0.6, -0.3, 0.1, 0.05, -0.9, 0.45, 0.2, -0.15, 0, 0.75, -0.6, 0.3, 0.12, -0.07, 0.5, -0.4]])
    w = w.repeat(1, 4)
    block = pack_native(NVFP4.quantize(w, NVFP4.qparams(w)), 11)
    assert block[0, :4].tolist() == [0x7A] * 4
    assert bytes(block[0, 4:12]).hex() == "066ce1412f9553da"
    w = torch.tensor([[-0.5, -0.25, 0.0, 0.25]]).repeat(1, 16)
    block = pack_native(Q2_0.quantize(w, Q2_0.qparams(w)))
    assert bytes(block[0]).hex() == "00b4" + "1b" * 16  # float16 -0.25; codes 3, 2, 1, 0 from the lowest bits


@pytest.mark.parametrize("scheme", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "q2_0", "mxfp4a16", "nvfp4a16"])
def test_a_run_as_a_file(scheme: str, tmp_path: Path) -> None:
    """Every value of the file equals the run's; the model that is read from it computes the same."""
    save_tiny(tmp_path / "m", "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=64)
    tiny_tokenizer(merge=True).save_pretrained(tmp_path / "m")
    text = str(tmp_path / "m/calib.txt")
    how = {"recipe": "gptq", "data": text, "samples": 2, "length": 16, "overrides": {"*.down_proj": "q6_k"}}
    lowbit.quantize(tmp_path / "m", tmp_path / "run", scheme=scheme, **how)
    made = lowbit.export(tmp_path / "run", "gguf", pre="gpt-2")
    (found,) = lowbit.verify(tmp_path / "run", [made.out], logits=False)
    assert found.ok, (found.differs, found.other, found.unreadable)
    kinds = {tensor.tensor_type.name for tensor in Reader(made.out).tensors}
    assert {NATIVE[scheme.removesuffix("a16")].name, "Q6_K"} <= kinds
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = lowbit.load(tmp_path / "run")(ids).logits
        read = lowbit.load(resolve(str(made.out), cache=tmp_path / "cache").folder)(ids).logits
    assert torch.allclose(read, ours, rtol=1e-4, atol=1e-4)


def test_one_wrong_byte_of_a_type_that_the_package_lacks_is_named(
    run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of("q2_0", overrides={"*.down_proj": "w4g32"})
    out = lowbit.export(run, "gguf", out=tmp_path / "m.gguf", pre="gpt-2").out
    (tensor,) = (t for t in Reader(out).tensors if t.name == "blk.1.attn_v.weight")
    assert tensor.tensor_type is OwnKind.Q2_0
    content = bytearray(out.read_bytes())
    content[tensor.data_offset + 5] ^= 0x10
    out.write_bytes(content)
    (found,) = lowbit.verify(run, [out], logits=False)
    assert found.differs == ["model.layers.1.self_attn.v_proj.weight"]
