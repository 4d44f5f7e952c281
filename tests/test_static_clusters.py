"""Static inputs with a range for each cluster of channels: arithmetic, calibration, files, and who refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.checkpoints.writing import write_tensors
from lowbit.errors import LowbitError
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.rtn import RTN
from lowbit.models.block import Calib
from lowbit.models.forward import observe, run_all
from lowbit.quant.compressed_tensors import inputs_args
from lowbit.quant.range_estimators import ClusterCounts, RangeEstimator
from lowbit.quant.scheme_names import parse_scheme
from lowbit.quant.static_activations import StaticInt
from lowbit.quant.static_clusters import SIZES, StaticClusters, over_clusters
from lowbit.runs.manifest import manifest_of
from runs import quantize_tiny, streamed_logits
from tiny import block_of, planned, save_tiny, tiny_ids, tiny_model

FORMATS = [StaticClusters(bits, symmetric, 4) for bits in (4, 8) for symmetric in (True, False)]
SIZED = [3, 1, 5, 2]


def drawn() -> torch.Tensor:
    """``(2, 9, 11)``; the clusters of ``SIZED`` have sizes of their own, one is of one sign."""
    x = torch.randn(2, 9, 11, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 100
    x[..., 4:9] *= 0.01
    x[..., 9:] = x[..., 9:].abs() + 1
    return x


def qparams_of(format: StaticClusters, x: torch.Tensor):
    rows = x.flatten(0, -2)
    return format.qparams(over_clusters(rows.amin(0), SIZED, "amin"), over_clusters(rows.amax(0), SIZED, "amax"))


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_every_cluster_is_a_static_input_of_its_own(format: StaticClusters) -> None:
    x = drawn()
    found = format.on_qparams(x, qparams_of(format, x)).split(SIZED, -1)
    for own, values in zip(found, x.split(SIZED, -1), strict=True):
        one = StaticInt(format.bits, format.symmetric)
        wanted = one.on_qparams(values, one.qparams(values.amin().reshape(1), values.amax().reshape(1)))
        assert torch.equal(own, wanted)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_qparams_come_back_as_they_are(format: StaticClusters, dtype: torch.dtype) -> None:
    x = drawn().to(dtype)
    qparams = qparams_of(format, x.float())
    stored = format.pack(qparams)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {
        name: (own.dtype, own.shape) for name, own in format.tensors.items()
    }
    assert stored[SIZES].tolist() == SIZED
    back = format.unpack(stored)
    assert all(torch.equal(a, b) for a, b in zip(back, qparams, strict=True))
    assert torch.equal(format.on_qparams(x, back), format.on_qparams(x, qparams))
    low, high = format.range_of(qparams)
    assert all(torch.allclose(a, b) for a, b in zip(format.qparams(low, high), qparams, strict=True))


def test_fewer_ranges_than_clusters_leave_the_rest_empty() -> None:
    format = StaticClusters(8, symmetric=False, clusters=6)
    stored = format.pack(qparams_of(format, drawn()))
    assert stored[SIZES].tolist() == [*SIZED, 0, 0]
    assert len(format.unpack(stored).scale) == 11


def test_without_qparams_equal_parts_have_the_ranges_of_their_values() -> None:
    x, format = drawn(), StaticClusters(8, symmetric=False, clusters=3)
    parts = format.parts(11)
    assert parts == [4, 4, 3]
    rows = x.flatten(0, -2)
    ends = over_clusters(rows.amin(0), parts, "amin"), over_clusters(rows.amax(0), parts, "amax")
    assert torch.equal(format.fake_quant(x), format.on_qparams(x, format.qparams(*ends)))
    assert StaticClusters(8, True, 32).parts(5) == [1] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_scale": [1.0, 0.0, 1.0, 1.0]}, "something other than positive numbers"),
        ({"input_scale": [1.0, float("nan"), 1.0, 1.0]}, "something other than positive numbers"),
        ({"input_zero_point": [0, 99, 0, 0]}, "codes beyond -8 to 7"),
        ({SIZES: [3, -1, 5, 2]}, "sizes that no clusters have"),
        ({SIZES: [0, 0, 0, 0]}, "sizes that no clusters have"),
        ({SIZES: [1 << 30, 1, 1, 1]}, "sizes that no clusters have"),
    ],
)
def test_numbers_that_no_qparams_have_are_refused(change: dict[str, list[float]], message: str) -> None:
    format = FORMATS[1]
    stored = format.pack(qparams_of(format, drawn()))
    stored |= {name: torch.tensor(value).to(stored[name].dtype) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        format.unpack(stored)


def test_gradients_reach_the_ends_of_a_cluster() -> None:
    format, x = FORMATS[1], drawn()
    low, high = torch.full((11,), -0.5, requires_grad=True), torch.full((11,), 0.5, requires_grad=True)
    format.on_qparams(x, format.qparams(low, high)).square().sum().backward()
    assert low.grad is not None
    assert high.grad is not None
    assert bool((high.grad[9:] != 0).all())


# Names and calibration.


def test_names_of_schemes() -> None:
    scheme = parse_scheme("w4a8-static32")
    assert scheme.act == StaticClusters(8, symmetric=False, clusters=32)
    assert scheme.weight.symmetric
    assert scheme.act.name == "a8-asym-static32"
    assert parse_scheme("w4a4g16-sym-static8").act == StaticClusters(4, symmetric=True, clusters=8)
    assert parse_scheme("w8a8-static").act == StaticInt(8, symmetric=False)
    for name, message in {
        "w4a16-static32": "a16 given; static inputs in clusters are a4, a6 or a8",
        "w4afp8-static32": "afp8 given; static inputs in clusters",
        "w4a8-static1": "1 clusters given; 2 to 1024 are allowed",
        "w4a8-static9999": "9999 clusters given",
    }.items():
        with pytest.raises(LowbitError, match=message):
            parse_scheme(name)
    with pytest.raises(LowbitError, match="1 clusters given"):
        StaticClusters(8, True, 1)


def test_counts_of_clusters_are_those_of_their_values() -> None:
    x, format = drawn(), StaticClusters(8, symmetric=False, clusters=4)
    seen = ClusterCounts(SIZED)
    for part in x:
        seen.add(part)
    low, high, share = RangeEstimator("min-max").of_clusters(seen, format)
    rows = x.flatten(0, -2)
    assert torch.equal(low, over_clusters(rows.amin(0), SIZED, "amin").clamp(max=0))
    assert torch.equal(high, over_clusters(rows.amax(0), SIZED, "amax").clamp(min=0))
    assert share == 0
    *_, clipped = RangeEstimator("percentile", 90.0).of_clusters(seen, format)
    assert 0.05 < clipped < 0.3


def test_calibration_gives_equal_parts_their_own_ranges() -> None:
    block, x = block_of(tiny_model("llama-odd"), 1)
    block = planned(block, "w8a8-static8")
    calib = Calib(x, x, run_all(block, x), input_range=RangeEstimator("min-max"))
    found = with_input_ranges(block, calib)
    name = block.linears()[-1]
    parts: list[torch.Tensor] = []
    observe(block, x, {name: parts.append})
    values = torch.cat(parts).flatten(0, -2)
    format = block.input_format(name)
    sizes = format.parts(values.shape[1])
    ends = over_clusters(values.amin(0), sizes, "amin"), over_clusters(values.amax(0), sizes, "amax")
    assert torch.equal(found.input_qparams[name].scale, format.qparams(*ends).scale)
    figures = found.record[1]["input_ranges"][name]
    assert figures == {"low": float(values.min()), "high": float(values.max()), "clipped": 0.0}


# Runs on disk.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clusters")
    save_tiny(folder / "model", "llama", num_hidden_layers=2)
    return quantize_tiny(folder / "model", folder / "run", "w8a8-sym-static8", "rptq").out


def test_load_computes_what_was_evaluated(run: Path) -> None:
    ids = tiny_ids(2, 16, seed=3)
    with torch.no_grad():
        ours = lowbit.load(run)(ids).logits
    torch.testing.assert_close(ours, streamed_logits(run, ids), rtol=1e-4, atol=1e-4)
    manifest = manifest_of(run)
    assert set(manifest.runtime_ops.values()) == {"reorder"}
    assert "reordered channels after norms stay online" in manifest.transformers.why_not
    assert "a8-sym-static8 inputs have a range for each cluster of channels" in manifest.transformers.why_not


@pytest.mark.parametrize("target", ["vllm", "onnx", "gguf", "gptq", "awq"])
def test_exports_refuse_it_by_name(run: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(LowbitError) as refused:
        lowbit.export(run, target, out=tmp_path / "out")
    assert "reorder" in str(refused.value) or "a8-sym-static8" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_stock_libraries_are_told_that_they_do_not_know_the_inputs(run: Path) -> None:
    assert inputs_args(parse_scheme("w8a8-static8").act)["num_bits"] == "a8-asym-static8"


def test_clusters_of_another_width_are_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    shard = broken / "block-00001.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith(SIZES))
    tensors[name] = tensors[name].clone()
    tensors[name][0] += 1
    write_tensors(shard, tensors)
    with pytest.raises(
        LowbitError, match=r"has clusters of \d+ channels, config.json implies \d+: they do not match"
    ):
        lowbit.load(broken)


def test_rtn_needs_no_reorder(tmp_path: Path) -> None:
    block, x = block_of(tiny_model("opt"), 1)
    block = planned(block, "w8a8-static8")
    done = RTN()(block, Calib(x, x, run_all(block, x)))
    assert not done.ops
    assert set(done.input_qparams) == set(block.linears())
