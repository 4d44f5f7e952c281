"""``--keep``: the codes of a quantized source become a run folder, and from there any export, with equal values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gguf_files
import lowbit
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.exporters.run import open_run
from lowbit.exporters.target import value_of
from quantized_sources import (
    AWQ_CONFIG,
    FP8_CONFIG,
    MXFP4_CONFIG,
    awq,
    edit,
    fp8,
    gptq,
    gptq_config,
    mxfp4,
    save_quantized,
)
from runs import folder_bytes
from tiny import save_tiny
from test_sources import compressed, compressed_config, floats, ints

# Name; how linears are packed; the config; the scheme of the run; what it exports to.
KEPT: dict[str, tuple[Any, dict[str, Any], str, tuple[str, ...]]] = {
    "gptq": (gptq(), gptq_config(), "w4a16g32-sym", ("gguf", "onnx")),
    "gptq 2 bits asymmetric": (gptq(2, symmetric=False), gptq_config(2), "w2a16g32-asym", ("gguf", "onnx")),
    "awq": (awq, AWQ_CONFIG, "w4a16g32-asym", ("gguf", "onnx")),
    "mxfp4": (mxfp4, MXFP4_CONFIG, "mxfp4a16", ("gguf",)),
    "fp8": (fp8, FP8_CONFIG, "fp8-blocka16:f32", ()),
    "packed": (
        compressed("pack-quantized", ints(4, 32, True), torch.bfloat16),
        compressed_config("pack-quantized", ints(4, 32, True)),
        "w4a16g32-sym",
        ("gguf", "onnx"),
    ),
    "mxfp8": (
        compressed("mxfp8-quantized", floats(8, "group", 32, scale_dtype="torch.uint8")),
        compressed_config("mxfp8-quantized", floats(8, "group", 32, scale_dtype="torch.uint8")),
        "mxfp8a16",
        (),
    ),
}


def check_values(folder: Path, values: dict[str, torch.Tensor]) -> None:
    """Every parameter of a run has the source's value."""
    run = open_run(folder)
    names = {*run.floats, *(f"{module}.weight" for module in run.quantized)}
    assert names == values.keys()
    for name in names:
        assert torch.equal(value_of(run, name), values[name].float()), name


@pytest.mark.parametrize("name", KEPT)
def test_a_source_goes_through_a_run_to_its_exports_with_equal_values(name: str, tmp_path: Path) -> None:
    pack, config, scheme, targets = KEPT[name]
    values = save_quantized(tmp_path / "m", pack, config)
    made = lowbit.quantize(tmp_path / "m", tmp_path / "run", keep=True)
    identity = made.manifest.identity
    assert (identity.scheme["scheme"], identity.recipe_name, identity.steps) == (scheme, "keep", ["keep"])
    assert (identity.data.corpus, identity.data.samples) == ("none", 0)
    check_values(made.out, values)
    for target in targets:
        out = lowbit.export(made.out, target).out
        (result,) = lowbit.verify(made.out, [out])
        assert result.ok, result


@pytest.mark.heavy
@pytest.mark.parametrize("name", [n for n in KEPT])
def test_stock_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    pack, config, _, _ = KEPT[name]
    save_quantized(tmp_path / "m", pack, config)
    made = lowbit.quantize(tmp_path / "m", tmp_path / "run", keep=True)
    assert made.manifest.transformers.loads
    (result,) = lowbit.verify(made.out)
    assert result.ok, result
