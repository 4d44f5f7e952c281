"""What nothing could absorb: dense maps after norms and learned clipping of activations, from fit to every reader."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.safetensors_folder import Checkpoint, read_json, write_json, write_tensors
from lowbit.errors import LowbitError
from lowbit.models.architecture import module_of
from lowbit.models.block import relative_error, run, run_all
from lowbit.quant.affine import QuantSpec, fake_quant_tokens
from lowbit.quant.scheme import parse_scheme
from lowbit.runs.folder import block_file, refuse_online
from lowbit.runs.streamed_model import StreamedModel
from test_runner import folder_bytes, quantized
from tiny import block_of, save_tiny, tiny_ids, tiny_model

DENSE = ["affinequant.qkv=matrix", "affinequant.mlp=matrix", "affinequant.epochs=2", "affinequant.lr_maps=0.02"]
CLIP = ["affinequant.act_clip=true", "affinequant.epochs=2"]
FAMILIES = ["llama", "llama-odd", "gemma3", "phi3", "opt"]


def with_dense_maps(block, generator):
    """Each norm's readers take ``W A^T``; its output will be multiplied by ``A^-1``."""
    params, online = dict(block.params), {}
    for edge in block.edges():
        if edge.kind != "norm":
            continue
        name = module_of(edge.src)
        width = block.params[f"{name}.weight"].shape[0]
        noise = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
        a = torch.eye(width, dtype=torch.float64) + 0.3 * noise
        online[name] = torch.linalg.inv(a)
        for dst in edge.dst:
            params[f"{module_of(dst)}.weight"] = params[f"{module_of(dst)}.weight"] @ a.mT
    return replace(block, params=params, online=online)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dense_map_that_runs_after_its_norm_leaves_the_float_function(name):
    block, x = block_of(tiny_model(name), 1, dtype=torch.float64)
    wanted = run(block, x)
    moved = with_dense_maps(block, torch.Generator().manual_seed(0))
    assert len(moved.online) == 2
    error = (run(moved, x) - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-4 if block.family.norm_offset else 1e-10)
    assert (run(replace(moved, online={}), x) - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert all(not m._forward_hooks for layer in block.layers for m in layer.modules())


def test_gradients_reach_maps_and_clipping_factors():
    block, x = block_of(tiny_model("opt"), 1, dtype=torch.float64)
    moved = with_dense_maps(block, torch.Generator().manual_seed(0))
    norm = next(iter(moved.online))
    map = moved.online[norm].clone().requires_grad_()
    run(replace(moved, online={norm: map}), x).square().sum().backward()
    direction = torch.randn(map.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def at(step):
        with torch.no_grad():
            return float(run(replace(moved, online={norm: map + step * direction}), x).square().sum())

    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    assert float((map.grad * direction).sum()) == pytest.approx(slope, rel=1e-5)
    ends = torch.tensor([0.8, 0.9], dtype=torch.float64, requires_grad=True)
    run(replace(block, online={"1.fc1": ends}), x, scheme=parse_scheme("w4a4")).square().sum().backward()
    assert (ends.grad != 0).all()


def test_clipped_ranges_clip():
    x = torch.tensor([[-1.0, -0.2, 0.5, 3.0]])
    spec = QuantSpec(4, symmetric=False)
    assert torch.equal(fake_quant_tokens(x, spec, 1.0, 1.0), fake_quant_tokens(x, spec))
    clipped = fake_quant_tokens(x, spec, torch.tensor(0.5), torch.tensor(0.5))
    step = 2.0 / 15  # the range is -0.5 to 1.5
    assert float(clipped.max()) == pytest.approx(1.5, abs=step)
    assert float(clipped.min()) == pytest.approx(-0.5, abs=step)
    assert abs(float(clipped[0, 2]) - 0.5) <= step / 2 + 1e-6
    symmetric = fake_quant_tokens(x, replace(spec, symmetric=True), 1.0, torch.tensor(0.5))
    assert float(symmetric.max()) == pytest.approx(1.5, abs=0.2)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("scheme", "settings"), [("w3a16-asym", DENSE), ("w4a4", CLIP), ("w4a4", DENSE + CLIP)])
def test_every_reader_of_the_folder_runs_what_is_online(scheme, settings, name, tmp_path):
    model = save_tiny(tmp_path / "m", name)
    made = quantized(tmp_path / "m", tmp_path / "out", scheme, "affinequant", settings=settings)
    ids = tiny_ids()
    simulated = torch.cat([logits for _, logits in StreamedModel(tmp_path / "out").logits(ids)])
    loaded = lowbit.load(tmp_path / "out")(ids, use_cache=False).logits.detach()
    assert float((loaded - simulated).abs().max() / simulated.abs().max()) < 1e-5
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
    assert 1e-6 < relative_error(simulated, exact) < 0.3
    manifest = made.manifest
    blocks, linears = len(manifest["blocks"]), len(manifest["quantized"]) // len(manifest["blocks"])
    maps, clips = 2 * blocks * (settings[0] == DENSE[0]), linears * blocks * (CLIP[0] in settings)
    assert len(manifest["online"]) == maps + clips
    plain = quantized(tmp_path / "m", tmp_path / "plain", scheme).manifest
    weights = sum(
        p.numel() for n, p in model.named_parameters() if n.removesuffix(".weight") in manifest["quantized"]
    )
    more = 32 * (64 * 64 * maps + 2 * clips) / weights
    assert manifest["bits_per_weight"] == pytest.approx(plain["bits_per_weight"] + more)
    assert made.bits_per_weight == manifest["bits_per_weight"]
    assert not manifest["transformers"]["loads"]
    assert "online" in manifest["transformers"]["why_not"]
    assert any("lowbit.load" in warning for warning in made.warnings)
    with pytest.raises(LowbitError, match="onnx cannot carry"):
        refuse_online(manifest, "onnx")
    refuse_online(plain, "onnx")


def test_stock_transformers_stops_instead_of_running_another_graph(tmp_path):
    save_tiny(tmp_path / "m", "llama")
    quantized(tmp_path / "m", tmp_path / "out", "w3a16-asym", "affinequant", settings=DENSE)
    with pytest.raises(ValueError, match=r"only lowbit\.load runs this folder"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_run_with_online_maps_that_was_stopped_gives_the_same_bytes(tmp_path, monkeypatch):
    save_tiny(tmp_path / "m", "llama-odd")
    settings = DENSE + CLIP
    quantized(tmp_path / "m", tmp_path / "whole", "w4a4", "affinequant", settings=settings)

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
            quantized(tmp_path / "m", tmp_path / "stopped", "w4a4", "affinequant", settings=settings)
    assert (tmp_path / "stopped" / block_file(0)).exists()
    quantized(tmp_path / "m", tmp_path / "stopped", "w4a4", "affinequant", settings=settings)
    assert folder_bytes(tmp_path / "stopped") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("input_layernorm", (64, 63), r"\(64, 63\); \(64, 64\) or \(2, 64\) or \(3, 64\) is expected"),
        ("input_layernorm", (3, 64), "names channels that are not there"),
        ("mlp.down_proj", (3,), r"\(2,\) or \(98,\) is expected"),
        ("mlp.act_fn", (2,), "no module can have"),
    ],
)
def test_a_broken_online_tensor_is_one_line(name, shape, message, tmp_path):
    save_tiny(tmp_path / "m", "llama")
    quantized(tmp_path / "m", tmp_path / "out", "w4a16")
    shard = Checkpoint(tmp_path / "out", [block_file(1)])
    tensors = {key: shard.read([key])[key] for key in shard.names}
    added = f"model.layers.1.{name}.online"
    write_tensors(tmp_path / "out" / block_file(1), {**tensors, added: torch.full(shape, 1.5)})
    index = read_json(tmp_path / "out/model.safetensors.index.json")
    index["weight_map"][added] = block_file(1)
    write_json(tmp_path / "out/model.safetensors.index.json", index)
    for read in (
        lambda: list(StreamedModel(tmp_path / "out").logits(tiny_ids())),
        lambda: lowbit.load(tmp_path / "out"),
    ):
        with pytest.raises(LowbitError, match=message):
            read()
