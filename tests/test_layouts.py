"""Every format in its layout: back bit for bit, and as the layouts' own readers decode it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contracts import COLUMNS, extreme_rows, hard_rows
from lowbit.quant.floating import FLOATS, MXFP4, MXFP6, NVFP4
from lowbit.quant.format import Format
from lowbit.quant.formats import FORMATS
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import KQuant
from lowbit.quant.layout import Stored
from lowbit.quant.layouts import LAYOUTS, PLAIN, layout_of
from lowbit.quant.scale_search import search_scales

CASES = [format for kind in FORMATS.values() for format in kind.examples()]


@pytest.mark.parametrize("format", CASES, ids=lambda format: format.name)
@pytest.mark.parametrize("searched", [False, True], ids=["rule", "searched"])
@pytest.mark.parametrize("rows", [hard_rows, extreme_rows], ids=lambda rows: rows.__name__)
def test_a_weight_comes_back(format: Format, rows: Any, searched: bool) -> None:
    weight = rows(torch.float32, COLUMNS)
    qparams = format.qparams(weight)
    if searched:
        qparams = search_scales(weight, format, qparams)
    q = format.quantize(weight, qparams)
    layouts = [layout_of(format)] + ([PLAIN] if isinstance(format, IntFormat) else [])
    for layout in layouts:
        stored = layout.pack(q)
        assert tuple(stored) == layout.tensors(format)
        found = {name: Stored(value.dtype, tuple(value.shape)) for name, value in stored.items()}
        assert found == layout.stored(format, *weight.shape)
        for name in stored:
            with pytest.raises(ValueError, match=r"(is|are) allowed"):
                layout.unpack({**stored, name: stored[name].double()}, format)
            if name == layout.tensors(format)[0]:
                continue  # the codes say how many rows there are
            with pytest.raises(ValueError, match=r"(is|are) allowed"):
                layout.unpack({**stored, name: torch.cat([stored[name], stored[name][:1]])}, format)
        again = layout.unpack(stored, format)
        assert torch.equal(again.codes, q.codes)
        assert torch.equal(again.qparams.scale, qparams.scale)
        assert torch.equal(again.dequantize(), format.fake_quant(weight, qparams))
        bits = sum(8 * value.numel() * value.element_size() for name, value in stored.items() if "shape" not in name)
        if layout is not PLAIN and format.zero != "code":
            shared = 32 if "weight_global_scale" in stored else 0
            most = format.bits_per_value(COLUMNS) * weight.numel() + 16 * len(weight)
            if isinstance(format, KQuant):  # integers of a scale take a byte each
                spare = (1 + format.has_minimum) * (8 - format.scales.bits)
                most += spare * weight.numel() / format.group
            assert bits - shared <= most


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decoded(name: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The values as the layouts' definition says, without the package's code."""
    scale = stored["weight_scale"]
    if name.startswith(("nvfp4", "mxfp4")):
        packed = stored["weight_packed"]
        values = E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]
        size = 16 if name.startswith("nvfp4") else 32
        step = scale.float() / stored["weight_global_scale"] if size == 16 else 2.0 ** (scale.float() - 127)
        return (values.unflatten(-1, (-1, size)) * step[..., None]).flatten(-2)
    if name.startswith("mxfp6"):
        b = stored["weight_packed"].unflatten(-1, (-1, 3)).int()
        word = b[..., 0] | b[..., 1] << 8 | b[..., 2] << 16
        c = torch.stack([(word >> s) & 63 for s in (0, 6, 12, 18)], -1).flatten(-2)
        e, m = (c >> 3) & 3, (c & 7) / 8
        v = torch.where(e == 0, m, (1 + m) * 2.0 ** (e - 1)) * torch.where(c > 31, -1.0, 1.0)
        return (v.unflatten(-1, (-1, 32)) * (2.0 ** (scale.float() - 127))[..., None]).flatten(-2)
    values = stored["weight"].float()
    if name == "mxfp8-quantized":
        return (values.unflatten(-1, (-1, 32)) * (2.0 ** (scale.float() - 127))[..., None]).flatten(-2)
    step = scale.float()
    if step.ndim == 2 and step.shape[0] != len(values):
        step = step.repeat_interleave(128, 0)[: len(values)].repeat_interleave(128, 1)[:, : values.shape[1]]
    return values * step


@pytest.mark.parametrize("name", FLOATS)
def test_floats_as_an_independent_decoder_reads_them(name: str) -> None:
    format = FLOATS[name]
    columns = 576 if name == "fp8-block" else 256  # a tile at the edge is smaller
    weight = torch.randn(300, columns, generator=torch.Generator().manual_seed(0))
    weight[5] = 0
    q = format.quantize(weight, format.qparams(weight))
    layout = layout_of(format)
    assert torch.equal(decoded(layout.name, layout.pack(q)), q.dequantize())


def theirs(format: Any, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight as compressed-tensors decompresses it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from lowbit.quant.compressed_tensors import weights_args

    layout = layout_of(format)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights_args(format)))
    compressor = BaseCompressor.get_value_from_registry(layout.name)
    # A float32 model reads scales of 16 bits as float32.
    read = {n: v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for n, v in stored.items()}
    return compressor.decompress(read, scheme)["weight"].float()


@pytest.mark.parametrize(
    "format", [*FLOATS.values(), IntFormat(4, 32), IntFormat(3), IntFormat(8)], ids=lambda f: f.name
)
def test_as_compressed_tensors_reads_them(format: Any) -> None:
    columns = 576 if format.name == "fp8-block" else 256
    weight = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0))
    q = format.quantize(weight, format.qparams(weight))
    assert layout_of(format).unpack(layout_of(format).pack(q), format).codes.equal(q.codes)
    values = theirs(format, layout_of(format).pack(q))
    assert torch.equal(values, q.dequantize())


def test_worked_examples() -> None:
    w = torch.tensor([[0.6, -0.3, 0.1, 0.05, -0.9, 0.45, 0.2, -0.15, 0, 0.75, -0.6, 0.3, 0.12, -0.07, 0.5, -0.4]])
    stored = layout_of(NVFP4).pack(NVFP4.quantize(w, NVFP4.qparams(w)))
    assert bytes(stored["weight_packed"][0].tolist()).hex() == "c6115fa3604e92d5"
    assert stored["weight_scale"].view(torch.uint8).tolist() == [[0x7A]]
    assert stored["weight_global_scale"].tolist() == [2048]
    w = torch.zeros(1, 32)
    w[0, :4] = torch.tensor([7.5, -1.125, 0.5, -3.25])
    stored = layout_of(MXFP6).pack(MXFP6.quantize(w, MXFP6.qparams(w)))
    assert stored["weight_scale"].tolist() == [[127]]
    assert bytes(stored["weight_packed"][0, :3].tolist()).hex() == "5f4ad4"
    w[0, :6] = torch.tensor([7, -3.1, 1, 0.3, -0.2, 5])
    stored = layout_of(MXFP4).pack(MXFP4.quantize(w, MXFP4.qparams(w)))
    assert bytes(stored["weight_packed"][0, :3].tolist()).hex() == "b60140"  # no negative zero


def test_names() -> None:
    assert set(LAYOUTS) == {
        "pack-quantized",
        "int-quantized",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "mxfp6-pack-quantized",
        "mxfp8-quantized",
        "float-quantized",
        "lowbit-packed",
    }
