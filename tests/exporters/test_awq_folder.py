"""An AWQ folder holds the run's own codes and qparams, as onnxruntime-genai's loader reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.exporters.awq import pack_module, unpack_words
from lowbit.exporters.run import open_run
from lowbit.quant.integer import IntFormat
from tiny import spoil


@pytest.mark.parametrize("scheme", ["w4a16g32-sym", "w4a16g16-asym", "w4a16-asym"])
def test_it_reads_back_bit_for_bit(run_of: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    run = run_of(scheme, overrides={"*.1.self_attn.o_proj": "float"})
    (found,) = lowbit.verify(run, [lowbit.export(run, "awq", out=tmp_path / "awq").out])
    assert found.ok
    assert found.target == "awq"
    assert found.exact == found.tensors > 20


@pytest.mark.parametrize("scheme", ["w4a16g32-sym", "w4a16g16-asym"])
def test_the_loader_of_onnxruntime_genai_finds_the_same_codes(
    run_of: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    loader = pytest.importorskip("onnxruntime_genai.models.loaders.awq")
    folder = run_of(scheme)
    made = lowbit.export(folder, "awq", out=tmp_path / "awq")
    config = json.loads((made.out / "config.json").read_text())["quantization_config"]
    theirs = loader.AWQModel("awq", made.out, {"config": config}, 64, 32, 96, 3)
    run = open_run(folder)
    for layer in theirs.layers:
        for name, module in (("self_attn.k_proj", layer.self_attn.k_proj), ("mlp.down_proj", layer.mlp.down_proj)):
            q = run.qtensor(f"model.layers.{layer.layer_id}.{name}")
            low, high = module.qweight.flatten(1) & 15, module.qweight.flatten(1) >> 4
            assert torch.equal(torch.stack([low, high], -1).flatten(1), q.codes)
            assert torch.equal(module.scales.view_as(q.qparams.scale), q.qparams.scale.half())
            zeros = module.qzeros.view(len(q.codes), -1)
            found = torch.stack([zeros & 15, zeros >> 4], -1).flatten(1)[:, : q.qparams.zero.shape[1]]
            assert torch.equal(found.float(), q.qparams.zero)


def test_words_hold_eight_outputs_in_the_layouts_order() -> None:
    format = IntFormat(4, 32, symmetric=False)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    q = format.quantize(weight, format.qparams(weight))
    stored = pack_module(q)
    assert stored["qweight"].shape == (64, 2)
    for column in range(64):
        for word in range(2):
            for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                found = int(stored["qweight"][column, word]) >> 4 * place & 15
                assert found == int(q.codes[8 * word + output, column])
    assert torch.equal(unpack_words(stored["qzeros"]).float(), q.qparams.zero.T)


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales"])
def test_one_wrong_byte_is_named(run_of: Callable[..., Path], tmp_path: Path, key: str) -> None:
    run = run_of("w4a16g32-sym")
    made = lowbit.export(run, "awq", out=tmp_path / "awq")
    spoil(made.out / "block-00001.safetensors", f"model.layers.1.mlp.up_proj.{key}")
    assert lowbit.verify(run, [made.out])[0].differs == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("scheme", "overrides", "message"),
    [
        ("w4a4", {}, r"act: .*nearest that fits: w4a16-asym$"),
        ("w3a16g32-sym", {}, r"weight: .*3 bits.*nearest that fits: w4a16g32-sym$"),
        ("w4a16g32-sym", {"*.down_proj": "w4g16"}, r"one size.*--override '\*\.down_proj=w4g32-sym'$"),
        ("w4a16g32-sym", {"lm_head": "w4g32"}, r"embedding or head.*--override 'lm_head=float'$"),
    ],
)
def test_what_does_not_fit_is_refused(
    refusal_of: Callable[..., str], scheme: str, overrides: dict[str, str], message: str
) -> None:
    assert re.search(message, refusal_of("awq", scheme, overrides=overrides))
