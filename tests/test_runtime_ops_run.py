"""Runtime operations in runs: from the fit through the folder to every reader, and folders that are broken there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.writing import write_json, write_tensors
from lowbit.errors import LowbitError
from lowbit.methods import RTN
from lowbit.models.block import Calib
from lowbit.models.edges import Projection
from lowbit.models.experts import parameter_shapes
from lowbit.models.forward import relative_error, run, run_all
from lowbit.models.runtime_ops import Clip, Gather, Matrix, tensor_name
from lowbit.quant.scheme_names import parse_scheme
from lowbit.runs.folder import block_file
from lowbit.runs.latent_weights import Latents, latent_file, write_latents
from lowbit.runs.reading import read_ops
from lowbit.runs.streamed_model import StreamedModel
from runs import folder_bytes, killed_and_resumed, quantize_tiny, streamed_logits
from tiny import block_of, planned, quantized, save_tiny, tiny_ids, tiny_model

pytestmark = pytest.mark.heavy  # makes whole runs by the dozen

DENSE = ["affinequant.qkv=matrix", "affinequant.mlp=matrix", "affinequant.epochs=2", "affinequant.lr_maps=0.02"]
CLIP = ["affinequant.act_clip=true", "affinequant.epochs=2"]
FAMILIES = ["llama", "llama-odd", "gemma3", "phi3", "opt"]


def with_dense_maps(block, generator):
    """Each norm's readers take ``W A^T``; its output will be multiplied by ``A^-1``."""
    params, ops = dict(block.params), {}
    for edge in block.edges():
        if edge.kind != "norm":
            continue
        width = block.params[edge.src.parameter].shape[0]
        noise = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
        a = torch.eye(width, dtype=torch.float64) + 0.3 * noise
        ops[edge.src.module] = Matrix(torch.linalg.inv(a))
        for dst in edge.readers:
            assert isinstance(dst, Projection)
            dst.change_weight(params, lambda weight, a=a: weight @ a.mT)
    return replace(block, params=params, ops=ops)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dense_map_that_runs_after_its_norm_leaves_the_float_function(name):
    block, x = block_of(tiny_model(name), 1, dtype=torch.float64)
    wanted = run(block, x)
    moved = with_dense_maps(block, torch.Generator().manual_seed(0))
    assert len(moved.ops) == 2
    error = (run(moved, x) - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-4 if any(edge.offset for edge in block.edges()) else 1e-10)
    assert (run(replace(moved, ops={}), x) - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert all(not m._forward_hooks for layer in block.layers for m in layer.modules())


def test_gradients_reach_maps_and_clipping_ratios():
    block, x = block_of(tiny_model("opt"), 1, dtype=torch.float64)
    moved = with_dense_maps(block, torch.Generator().manual_seed(0))
    norm = next(iter(moved.ops))
    map = moved.ops[norm].matrix.clone().requires_grad_()
    run(replace(moved, ops={norm: Matrix(map)}), x).square().sum().backward()
    direction = torch.randn(map.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def at(step):
        with torch.no_grad():
            return float(run(replace(moved, ops={norm: Matrix(map + step * direction)}), x).square().sum())

    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    assert float((map.grad * direction).sum()) == pytest.approx(slope, rel=1e-5)
    ends = torch.tensor([0.8, 0.9], dtype=torch.float64, requires_grad=True)
    clipped = replace(planned(block, "w4a4"), ops={"1.fc1": Clip(ends)})
    run(clipped, x, quantized=True).square().sum().backward()
    assert (ends.grad != 0).all()


def bits_without_ops(scheme: str, model: torch.nn.Module, modules: list[str]) -> float:
    """Codes, scales and zeros over weights."""
    format = parse_scheme(scheme).weight
    shapes = [model.get_parameter(f"{name}.weight").shape for name in modules]
    return sum(out * width * format.bits_per_value(width) for out, width in shapes) / sum(a * b for a, b in shapes)


# Both kinds on every family, each alone on one.
CASES = [
    ("llama", "w3a16-asym", DENSE),
    ("llama", "w4a4", CLIP),
    *((name, "w4a4", DENSE + CLIP) for name in FAMILIES),
]


@pytest.mark.parametrize(("name", "scheme", "settings"), CASES)
def test_every_reader_of_the_folder_runs_what_is_online(name, scheme, settings, tmp_path):
    model = save_tiny(tmp_path / "m", name)
    made = quantize_tiny(tmp_path / "m", tmp_path / "out", scheme, "affinequant", settings=settings)
    ids = tiny_ids()
    simulated = streamed_logits(tmp_path / "out", ids)
    loaded = lowbit.load(tmp_path / "out")(ids, use_cache=False).logits.detach()
    assert float((loaded - simulated).abs().max() / simulated.abs().max()) < 1e-5
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
    assert 1e-6 < relative_error(simulated, exact) < 0.3
    manifest = made.manifest
    blocks, linears = len(manifest.blocks), len(manifest.quantized) // len(manifest.blocks)
    maps, clips = 2 * blocks * (settings[0] == DENSE[0]), linears * blocks * (CLIP[0] in settings)
    kinds = list(manifest.runtime_ops.values())
    assert (kinds.count("matrix"), kinds.count("clip"), len(kinds)) == (maps, clips, maps + clips)
    at_linears = {module for module, kind in manifest.runtime_ops.items() if kind == "clip"}
    assert at_linears <= set(manifest.quantized)
    assert all("norm" in module for module in set(manifest.runtime_ops) - at_linears)
    assert read_json(tmp_path / "out/lowbit.json")["runtime_ops"] == manifest.runtime_ops
    weights = sum(model.get_parameter(f"{name}.weight").numel() for name in manifest.quantized)
    more = 32 * (64 * 64 * maps + 2 * clips) / weights
    plain = bits_without_ops(scheme, model, manifest.quantized)
    assert manifest.bits_per_weight == pytest.approx(plain + more)
    assert made.bits_per_weight == manifest.bits_per_weight
    assert not manifest.transformers.loads
    for what, count in (("matrices after norms", maps), ("clipped ranges", clips)):
        assert (f"{count} {what}" in manifest.transformers.why_not) == bool(count)
    assert any("lowbit.load" in warning for warning in made.warnings)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A finished run with a matrix behind each norm of its layers."""
    return quantized(tmp_path_factory.mktemp("dense"), "w3a16-asym", recipe="affinequant", settings=DENSE)


def test_stock_transformers_stops_instead_of_running_another_graph(dense):
    with pytest.raises(ValueError, match=r"only lowbit\.load runs this folder"):
        AutoModelForCausalLM.from_pretrained(dense)


def test_a_run_with_runtime_ops_that_was_stopped_gives_the_same_bytes(tmp_path, monkeypatch):
    save_tiny(tmp_path / "m", "llama-odd")
    settings = DENSE + CLIP
    quantize_tiny(tmp_path / "m", tmp_path / "whole", "w4a4", "affinequant", settings=settings)

    class Killed(BaseException):
        pass

    def dies(block, *args, **kwargs):
        if block.start == 1:
            raise Killed
        return real(block, *args, **kwargs)

    real = run_all
    with monkeypatch.context() as patched:
        patched.setattr("lowbit.pipeline.runner.run_all", dies)
        with pytest.raises(Killed):
            quantize_tiny(tmp_path / "m", tmp_path / "stopped", "w4a4", "affinequant", settings=settings)
    assert (tmp_path / "stopped" / block_file(0)).exists()
    quantize_tiny(tmp_path / "m", tmp_path / "stopped", "w4a4", "affinequant", settings=settings)
    assert folder_bytes(tmp_path / "stopped") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("settings", [(), ("hadamard.signs=false", "hadamard.block=16")], ids=["signs", "fixed"])
def test_a_run_with_transforms_that_was_stopped_gives_the_same_bytes(settings, tmp_path, monkeypatch):
    save_tiny(tmp_path / "m", "llama")

    def make(name):
        return quantize_tiny(tmp_path / "m", tmp_path / name, "w4a4", "hadamard+gptq", settings=settings).out

    resumed = killed_and_resumed(lambda: make("stopped"), monkeypatch)
    assert folder_bytes(resumed) == folder_bytes(make("whole"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run without runtime ops."""
    return quantized(tmp_path_factory.mktemp("whole"), "w4a16")


def with_tensors(folder: Path, out: Path, added: dict[str, torch.Tensor]) -> Path:
    """A copy of a run with tensors more in the shard of its second layer."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    shard = Checkpoint(out, [block_file(1)])
    tensors = {key: shard.read([key])[key] for key in shard.names}
    added = {f"model.layers.1.{name}": value for name, value in added.items()}
    write_tensors(out / block_file(1), {**tensors, **added})
    index = read_json(out / "model.safetensors.index.json")
    index["weight_map"] |= dict.fromkeys(added, block_file(1))
    write_json(out / "model.safetensors.index.json", index)
    return out


NORM, LINEAR = "input_layernorm", "mlp.down_proj"
EYE, RATIOS, CHANNELS = torch.eye(64), torch.ones(2), torch.arange(64, dtype=torch.int32)
# One of each kind, by where it stands in a layer.
OPS = {
    NORM: Gather(torch.arange(64).flip(0), torch.linspace(0.5, 2, 64), torch.full((64,), -1)),
    "post_attention_layernorm": Matrix(EYE + 0.1),
    LINEAR: Clip(torch.tensor([0.9, 0.8]), torch.linspace(-0.5, 0.5, 96)),
}


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({f"{NORM}.runtime.matrix.matrix": EYE[:, :63]}, r"its matrix holds .*\(64, 63\).*\(64, 64\).* is expected"),
        ({f"{NORM}.runtime.matrix.matrices": EYE}, "its matrix holds .*'matrices'.* is expected"),
        ({f"{NORM}.runtime.gather.idx": CHANNELS}, "its gather holds .* is expected"),
        (
            {f"{NORM}.runtime.gather.idx": CHANNELS + 1, f"{NORM}.runtime.gather.factor": EYE[0]},
            "its gather has channel indices out of range",
        ),
        ({f"{LINEAR}.runtime.clip.ratios": torch.ones(3)}, r"its clip holds .*\(3,\).* is expected"),
        (
            {f"{LINEAR}.runtime.clip.ratios": RATIOS, f"{LINEAR}.runtime.clip.offset": EYE[0]},
            r"its clip holds .*'offset': \(64,\).*\(96,\).* is expected",
        ),
        ({f"{NORM}.runtime.rotation.angles": EYE}, r"rotation\.angles' that no module can have"),
        ({"mlp.act_fn.runtime.clip.ratios": RATIOS}, "that no module can have"),
        ({f"{NORM}.runtime.clip.ratios": RATIOS}, "that no module can have"),
        ({f"{LINEAR}.runtime.matrix.matrix": EYE}, "that no module can have"),
        (
            {f"{NORM}.runtime.matrix.matrix": EYE, f"{NORM}.runtime.gather.idx": CHANNELS},
            r"gather|matrix.*that no module can have",
        ),
    ],
)
def test_a_broken_runtime_op_is_one_line(added, message, whole, tmp_path):
    folder = with_tensors(whole, tmp_path / "broken", added)
    for read in (lambda: streamed_logits(folder, tiny_ids()), lambda: lowbit.load(folder)):
        with pytest.raises(LowbitError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert "it is broken" in str(caught.value)


def test_what_is_stored_is_what_is_read(whole, tmp_path):
    stored = {
        tensor_name(module, op, key): value for module, op in OPS.items() for key, value in op.to_tensors().items()
    }
    folder = with_tensors(whole, tmp_path / "more", stored)
    model = StreamedModel(folder)
    skeleton = model.skeleton
    shapes = parameter_shapes(skeleton.architecture.layers[1], skeleton.layers[1])
    found = read_ops(model.checkpoint, skeleton.architecture, shapes, 1)
    assert {module: type(op) for module, op in found.items()} == {module: type(op) for module, op in OPS.items()}
    for module, op in OPS.items():
        for name in op.fields():
            assert torch.equal(getattr(found[module], name), getattr(op, name))
    assert read_ops(model.checkpoint, skeleton.architecture, shapes, 0) == {}
    assert model.block(1).ops.keys() == {f"1.{module}" for module in OPS}
    # Both readers run them, and the clip, which has no quantized input to clip here, does nothing.
    ids = tiny_ids()
    simulated, plain = streamed_logits(folder, ids), streamed_logits(whole, ids)
    loaded = lowbit.load(folder)(ids, use_cache=False).logits.detach()
    assert float((loaded - simulated).abs().max() / simulated.abs().max()) < 1e-5
    assert relative_error(simulated, plain) > 1e-2


def test_what_end_to_end_tuning_starts_from_has_them_too(tmp_path):
    block, x = block_of(tiny_model("llama"), 1)
    block = RTN()(planned(block, "w4a4"), Calib(x, x, x))
    kept = {f"1.{module}": op for module, op in OPS.items()}
    write_latents(tmp_path, replace(block, ops=kept))
    file = Checkpoint(tmp_path, [latent_file(1)])
    found = Latents(file.read(file.names))
    assert set(found.ops) == set(kept)
    for name, op in kept.items():
        assert type(found.ops[name]) is type(op)
        assert all(torch.equal(value, op.to_tensors()[key]) for key, value in found.ops[name].to_tensors().items())
    assert set(found.places) == set(block.qweights)
    assert set(found.params) == {name for name in block.params if name.removesuffix(".weight") not in block.qweights}


@pytest.mark.parametrize(
    ("kind", "match"),
    [("rotation", r"unknown runtime op .*'rotation'"), (None, r"has no valid 'runtime_ops\.model\.layers\.1")],
)
def test_a_manifest_with_a_kind_that_is_not_known_is_one_line(kind, match, whole, tmp_path):
    folder = with_tensors(whole, tmp_path / "broken", {})
    content = read_json(folder / "lowbit.json")
    write_json(folder / "lowbit.json", {**content, "runtime_ops": {"model.layers.1.input_layernorm": kind}})
    with pytest.raises(LowbitError, match=match) as caught:
        lowbit.export(folder, "gptq", out=tmp_path / "out")
    assert "\n" not in str(caught.value)
