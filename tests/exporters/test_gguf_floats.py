"""Formats without a type of llama.cpp's: their values as floats, each equal; what they cost is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import lowbit
from contracts import COLUMNS, extreme_rows, hard_rows
from lowbit.checkpoints.gguf_types import Reader, values_of
from lowbit.exporters import api
from lowbit.exporters.gguf_floats import exact_type
from lowbit.exporters.gguf_limits import type_of
from lowbit.exporters.run import open_run
from lowbit.quant.floating import FLOATS

WITHOUT = {name: format for name, format in FLOATS.items() if type_of(format, COLUMNS) is None}


def test_which_formats_are_stored_as_floats() -> None:
    assert WITHOUT.keys() == {"fp8", "fp8-tensor", "fp8-block", "mxfp6", "mxfp8"}


@pytest.mark.parametrize("rows", [hard_rows, extreme_rows], ids=lambda rows: rows.__name__)
@pytest.mark.parametrize("name", WITHOUT)
def test_the_package_reads_every_value(name: str, rows: Any) -> None:
    weight = rows(torch.float32, COLUMNS)
    value = WITHOUT[name].quantize(weight, WITHOUT[name].qparams(weight)).dequantize()
    kind = exact_type(value)
    stored = gguf.quants.quantize(value.numpy(), kind)
    assert torch.equal(torch.from_numpy(values_of(stored, kind)).view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize("name", ["mxfp6", "mxfp8"])
def test_a_power_of_two_as_the_scale_fits_bfloat16(name: str) -> None:
    weight = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(0))
    assert exact_type(WITHOUT[name].quantize(weight, WITHOUT[name].qparams(weight)).dequantize()) == Kind.BF16


@pytest.mark.parametrize(
    ("number", "kind"), [(1 + 2**-7, Kind.BF16), (1 + 2**-10, Kind.F16), (2.0**-24 * 3, Kind.BF16), (1e-30, Kind.F32)]
)
def test_the_smallest_type_that_is_exact(number: float, kind: Kind) -> None:
    assert exact_type(torch.tensor([[0.5, number]])) == kind


@pytest.fixture
def made(run_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path, str]:
    """A run in MXFP8, FP8 and MXFP4, its file, and what the screen said."""
    run = run_of("mxfp8a16", overrides={"*.down_proj": "fp8", "*.o_proj": "mxfp4"})
    out = lowbit.export(run, "gguf", out=tmp_path / "m.gguf", pre="gpt-2").out
    return run, out, capsys.readouterr().err


def test_each_matrix_has_the_smallest_exact_type_and_the_cost_is_said(made: tuple[Path, Path, str]) -> None:
    run, out, said = made
    (found,) = lowbit.verify(run, [out], logits=False)
    assert found.ok, (found.differs, found.other, found.unreadable)
    assert found.exact == found.tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in Reader(out).tensors}
    parts = ("ffn_up", "ffn_down", "attn_output")
    assert [kinds[f"blk.1.{part}.weight"] for part in parts] == ["BF16", "F32", "MXFP4"]
    assert Reader(out).fields["general.file_type"].contents() == 32  # mostly BF16
    weights = open_run(run).subject
    floats = [name for name, format in weights.weights.items() if format.name in WITHOUT]
    sizes = {name: weights.shapes[name][0] * weights.shapes[name][1] for name in floats}
    stored = sum(size * (4 if "down" in name else 2) for name, size in sizes.items()) / 1e6
    codes = sum(size * weights.weights[name].bits_per_value(weights.shapes[name][1]) for name, size in sizes.items())
    line = next(line for line in said.splitlines() if "has no type" in line)
    assert line.startswith("llama.cpp has no type for fp8, mxfp8: ")
    assert f" {len(floats)} weights are stored as BF16, F32 with equal values" in line
    assert f"in {stored:.1f} MB where codes and scales take {codes / 8e6:.1f} MB" in line


def test_one_wrong_byte_is_named(made: tuple[Path, Path, str]) -> None:
    run, out, _ = made
    (tensor,) = (tensor for tensor in Reader(out).tensors if tensor.name == "blk.1.ffn_down.weight")
    content = bytearray(out.read_bytes())
    content[tensor.data_offset + 2] ^= 1
    out.write_bytes(content)
    assert lowbit.verify(run, [out], logits=False)[0].differs == ["model.layers.1.mlp.down_proj.weight"]


def test_logits_are_compared_with_float_inputs_where_llamacpps_are_not_known(made: tuple[Path, Path, str]) -> None:
    run, _, _ = made
    ids = torch.arange(3, 12)
    with torch.no_grad():
        expected = lowbit.load(run)(ids[None]).logits[0]
    assert torch.equal(api._simulated(open_run(run), ids, "llama.cpp", False), expected)


def test_runs_without_such_formats_say_nothing(
    run_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lowbit.export(run_of("w4a16g32-sym"), "gguf", out=tmp_path / "m.gguf", pre="gpt-2")
    assert "has no type" not in capsys.readouterr().err
