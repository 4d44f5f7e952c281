"""llama.cpp's own formats as blocks, read back by the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize

import lowbit
from lowbit.checkpoints.resolve import resolve
from lowbit.exporters.gguf_native import NATIVE, native_type, pack_native
from lowbit.quant.floating import FLOATS, NVFP4
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import K_QUANTS
from lowbit.quant.scale_search import search_scales
from lowbit.quant.scales import shared_exponent
from lowbit.quant.tables import IQ4_NL
from tiny import save_tiny, tiny_tokenizer

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


@pytest.mark.parametrize("scheme", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "mxfp4a16", "nvfp4a16"])
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
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(made.out).tensors}
    assert {NATIVE[scheme.removesuffix("a16")].name, "Q6_K"} <= kinds
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = lowbit.load(tmp_path / "run")(ids).logits
        read = lowbit.load(resolve(str(made.out), cache=tmp_path / "cache").folder)(ids).logits
    assert torch.allclose(read, ours, rtol=1e-4, atol=1e-4)
