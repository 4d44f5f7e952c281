"""llama.cpp's own formats as blocks, read back by the gguf package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize

from lowbit.exporters.gguf_native import NATIVE, native_type, pack_native
from lowbit.quant.floating import FLOATS, NVFP4
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import K_QUANTS
from lowbit.quant.scale_search import search_scales
from lowbit.quant.scales import shared_exponent
from lowbit.quant.tables import IQ4_NL

FORMATS = {**K_QUANTS, **FLOATS, IQ4_NL.name: IQ4_NL}


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
    exponent = shared_exponent([qparams.scale]) or 0 if format is NVFP4 else 0
    blocks = pack_native(q, exponent)
    kind = native_type(format, 512)
    size, count = GGML_QUANT_SIZES[kind]
    assert blocks.shape == (6, 512 // size * count)
    assert blocks.dtype == np.uint8
    read = torch.from_numpy(np.array(dequantize(blocks, kind)))
    assert torch.equal(read * 2.0**-exponent, q.dequantize())


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
