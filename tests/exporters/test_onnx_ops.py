"""Runtime ops in an ONNX graph: each computes what the op computes, is read back bit for bit, and is shared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lowbit
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.writing import write_json, write_tensors
from lowbit.errors import LowbitError
from lowbit.exporters import onnx as target
from lowbit.exporters import onnx_ops
from lowbit.exporters.run import open_run
from lowbit.models.diagonal_blocks import DiagonalBlocks
from lowbit.models.fixed_hadamard import FixedHadamard
from lowbit.models.hadamard import Hadamard, random_flips
from lowbit.models.kronecker import Kronecker
from lowbit.models.reorder import Reorder
from lowbit.models.runtime_ops import Gather, Matrix, RuntimeOp, at_input, tensor_name
from lowbit.runs.folder import block_file
from runs import quantize_tiny
from tiny import save_tiny

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

WIDTH = 24
LAYER = "model.layers.0"
NORM, Q, K, DOWN = (
    f"{LAYER}.{name}" for name in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "mlp.down")
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ops_of(width: int) -> dict[str, RuntimeOp]:
    """One of every kind for a width that 8 divides, and those with a shape that is special."""
    return {
        "hadamard": Hadamard(random_flips(1, width, 0)),
        "hadamard in blocks": Hadamard(random_flips(width // 8, 8, 1)),
        "hadamard of an odd size": Hadamard(random_flips(8, width // 8, 2)),
        "fixed hadamard": FixedHadamard.of(width, 8),
        "kronecker": Kronecker(draw(4, 4), draw(width // 4, width // 4, seed=1)),
        "kronecker with one row": Kronecker(draw(1, 1), draw(width, width, seed=1)),
        "kronecker with one column": Kronecker(draw(width, width), draw(1, 1, seed=1)),
        "blocks": DiagonalBlocks(draw(width // 4, 4, 4)),
        "matrix": Matrix(draw(width, width)),
        "reorder": Reorder(torch.randperm(width, generator=torch.Generator().manual_seed(0))),
    }


OPS = ops_of(WIDTH)
each = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def fake_run(ops: dict[str, RuntimeOp]) -> Any:
    """As much of a run as names need."""
    shapes = dict.fromkeys((Q, K, DOWN), (WIDTH, WIDTH))
    return SimpleNamespace(ops=lambda: ops, subject=SimpleNamespace(shapes=shapes))


def graph() -> Any:
    """An RMS norm that q and k read, and a linear that reads the sum of both, as the builder names them."""
    from onnx import TensorProto, helper
    from onnx.numpy_helper import from_array

    weights = {f"{LAYER}.attn.q_proj.MatMul.weight": 1, f"{LAYER}.attn.k_proj.MatMul.weight": 2}
    weights |= {f"{LAYER}.mlp.down.MatMul.weight": 3}
    stored = [from_array(draw(WIDTH, WIDTH, seed=seed).numpy(), name) for name, seed in weights.items()]
    stored.append(from_array((1 + 0.3 * draw(WIDTH, seed=4)).numpy(), f"{NORM}.weight"))
    q, k, down = weights
    nodes = [
        helper.make_node("SimplifiedLayerNormalization", ["x", f"{NORM}.weight"], ["normed"], axis=-1, epsilon=1e-5),
        helper.make_node("MatMul", ["normed", q], ["q"]),
        helper.make_node("MatMul", ["normed", k], ["k"]),
        helper.make_node("Add", ["q", "k"], ["sum"]),
        helper.make_node("MatMul", ["sum", down], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "length", WIDTH]) for n in "xy")
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored), opset_imports=opsets, ir_version=10)


def outputs(model: Any, x: torch.Tensor) -> torch.Tensor:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


def expected(x: torch.Tensor, ops: dict[str, RuntimeOp]) -> torch.Tensor:
    """The same in float64."""

    def mix(place: str, value: torch.Tensor) -> torch.Tensor:
        return ops[place](value) if place in ops else value

    x = x.double()
    x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + 0.3 * draw(WIDTH, seed=4)).double()
    q, k, down = (draw(WIDTH, WIDTH, seed=seed).double() for seed in (1, 2, 3))
    x = mix(NORM, x)
    total = mix(at_input(Q), x) @ q + mix(at_input(K), x) @ k
    return mix(at_input(DOWN), total) @ down


def read_back(model: Any, run: Any) -> dict[str, torch.Tensor]:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    return dict(onnx_ops.read(run, model, lambda name: torch.tensor(onnx.numpy_helper.to_array(stored[name]))))


def wanted_tensors(ops: dict[str, RuntimeOp]) -> dict[str, torch.Tensor]:
    return {
        tensor_name(place, op, key): value.float()
        for place, op in ops.items()
        for key, value in op.to_tensors().items()
    }


@each
@pytest.mark.parametrize("place", [NORM, at_input(DOWN)])
def test_an_op_in_the_graph_computes_what_it_computes_and_is_read_back(op: RuntimeOp, place: str) -> None:
    ops, model, x = {place: op}, graph(), draw(2, 5, WIDTH, seed=7)
    onnx_ops.put_ops_in(model, fake_run(ops))
    got, wanted = outputs(model, x), expected(x, ops)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 2e-6
    assert float((outputs(graph(), x) - wanted).abs().max() / wanted.abs().max()) > 1e-2
    found = read_back(model, fake_run(ops))
    for name, value in wanted_tensors(ops).items():
        assert torch.equal(found.pop(name), value)
    size = op.flips.shape[1] if isinstance(op, Hadamard) else op.size if isinstance(op, FixedHadamard) else None
    factors = onnx_ops.hadamard_factors(size) if size else {}
    assert {name.rpartition(".")[2] for name in found} == set(factors)
    assert all(torch.equal(value, factors[name.rpartition(".")[2]]) for name, value in found.items())


def test_readers_of_one_tensor_share_an_op_and_each_has_it_when_read() -> None:
    mix = OPS["kronecker"]
    both = {at_input(Q): mix, at_input(K): mix}
    apart = {at_input(Q): mix, at_input(K): Kronecker(draw(4, 4, seed=5), draw(6, 6, seed=6))}
    counts = []
    for ops in (both, apart):
        model, x = graph(), draw(1, 5, WIDTH, seed=7)
        onnx_ops.put_ops_in(model, fake_run(ops))
        counts.append(sum(node.op_type == "MatMul" for node in model.graph.node) - 3)
        got, right = outputs(model, x), expected(x, ops)
        assert float((got - right).abs().max() / right.abs().max()) < 2e-6
        found, wanted = read_back(model, fake_run(ops)), wanted_tensors(ops)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert counts == [2, 4]


def test_one_op_behind_another() -> None:
    ops, model, x = {NORM: OPS["reorder"], at_input(Q): OPS["blocks"]}, graph(), draw(2, 3, WIDTH, seed=8)
    onnx_ops.put_ops_in(model, fake_run(ops))
    got, right = outputs(model, x), expected(x, ops)
    assert float((got - right).abs().max() / right.abs().max()) < 2e-6
    assert read_back(model, fake_run(ops)).keys() == wanted_tensors(ops).keys()


def test_an_op_without_a_place_stops_the_export() -> None:
    with pytest.raises(LowbitError, match=r"no place for the op at 'model\.layers\.9\.norm'") as caught:
        onnx_ops.put_ops_in(graph(), fake_run({"model.layers.9.norm": OPS["matrix"]}))
    assert "\n" not in str(caught.value)


# Whole runs, through the builder, which takes seconds.

RECIPES: list[Any] = [
    ("llama", {}, "w4a16g32-sym", ()),
    pytest.param("phi3", {}, "w3a16-asym", ("hadamard.block=16",), marks=pytest.mark.slow),
    ("llama", {"intermediate_size": 160}, "w8a8-sym-static", ()),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("family", "changes", "scheme", "settings"), RECIPES)
def test_a_run_with_hadamard_transforms_computes_the_same(
    tmp_path: Path, family: str, changes: dict[str, Any], scheme: str, settings: tuple[str, ...]
) -> None:
    pytest.importorskip("onnxruntime_genai")
    save_tiny(tmp_path / "m", family, **changes)
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", scheme, "hadamard", settings=settings).out
    (found,) = lowbit.verify(run, [lowbit.export(run, "onnx").out])
    assert found.ok
    assert found.logits is not None
    assert found.logits < (5e-3 if "static" in scheme else 2e-6)  # static inputs: a tie may fall the other way


@pytest.fixture(scope="module")
def every_kind(run_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an op of every kind; none is folded into a weight: its function is another, the same everywhere."""
    out = Path(shutil.copytree(run_of("w4a16g32-asym"), tmp_path_factory.mktemp("ops") / "run"))
    norm, wide = ops_of(64), ops_of(96)
    layers: list[dict[str, RuntimeOp]] = [
        {"input_layernorm": norm["reorder"], "mlp.down_proj.input": wide["hadamard"]},
        {"input_layernorm": norm["kronecker"], "post_attention_layernorm": norm["matrix"]},
        {
            **{f"self_attn.{name}_proj.input": norm["hadamard in blocks"] for name in "qkv"},
            "self_attn.o_proj.input": norm["blocks"],
            "post_attention_layernorm": norm["fixed hadamard"],
        },
    ]
    index = read_json(out / "model.safetensors.index.json")
    manifest = read_json(out / "lowbit.json")
    for number, ops in enumerate(layers):
        shard = Checkpoint(out, [block_file(number)])
        tensors = {key: shard.read([key])[key] for key in shard.names}
        for place, op in ops.items():
            module = f"model.layers.{number}.{place}"
            manifest["runtime_ops"][module] = op.kind
            tensors |= {tensor_name(module, op, key): value.clone() for key, value in op.to_tensors().items()}
        write_tensors(out / block_file(number), tensors)
        index["weight_map"] |= dict.fromkeys(tensors, block_file(number))
    write_json(out / "model.safetensors.index.json", index)
    write_json(out / "lowbit.json", manifest)
    return out


@pytest.mark.heavy
def test_a_run_with_every_kind_computes_the_same_and_a_wrong_byte_is_named(every_kind: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    made = lowbit.export(every_kind, "onnx", out=tmp_path / "made").out
    (found,) = lowbit.verify(every_kind, [made])
    assert found.ok
    assert found.logits is not None
    assert found.logits < 2e-5  # 6e-6 was measured, the noise of float32 products; 1e-4 counts as explained
    assert found.tensors == found.exact
    model = onnx.load(made / "model.onnx", load_external_data=False)
    for stored, named in {
        "model.layers.1.input_layernorm.runtime.kronecker.left": {"left"},
        "model.layers.0.mlp.down_proj.input.runtime.hadamard.factor_1": {"factor_1"},
        "model.layers.2.self_attn.q_proj.input.runtime.hadamard.signs": {"flips"},
    }.items():
        copy = Path(shutil.copytree(made, tmp_path / named.copy().pop()))
        (tensor,) = (t for t in model.graph.initializer if t.name == stored)
        at = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
        content = bytearray((copy / "model.onnx.data").read_bytes())
        content[at + 2] ^= 0x11
        (copy / "model.onnx.data").write_bytes(content)
        (wrong,) = lowbit.verify(every_kind, [copy], logits=False)
        assert {name.rpartition(".")[2] for name in wrong.differs} == named
        places = {name.partition(".runtime.")[0] for name in wrong.differs}
        own = stored.partition(".runtime.")[0]
        # q, k and v share the op, and each of them has it.
        assert places == ({own.replace("q_proj", f"{n}_proj") for n in "qkv"} if "q_proj" in own else {own})


def test_what_the_graph_does_not_hold_is_refused_before_any_work(every_kind: Path, tmp_path: Path) -> None:
    subject = open_run(every_kind).subject
    assert target.EXPORTER.misfit(subject) is None
    manifest = read_json(every_kind / "lowbit.json")
    broken = Path(shutil.copytree(every_kind, tmp_path / "run"))
    manifest["runtime_ops"]["model.layers.0.input_layernorm"] = Gather.kind
    write_json(broken / "lowbit.json", manifest)
    with pytest.raises(LowbitError, match="leaves gathers after norms at run time"):
        lowbit.export(broken, "onnx", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
