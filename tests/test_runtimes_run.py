"""The simulated quantization of inputs against the runtimes themselves, where they are installed, on an x86 CPU.

Products of the simulated inputs are summed in float64. What is left is the runtime's own float32 sums (1e-7, and 2e-6
where rows of one sign cancel against the zeros' part), where float inputs differ by half a percent.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.quant.format import QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.runtimes import RuntimeInput, q8_0, q8_k

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="kernels of another CPU")
SUM = 5e-6


def problem(format: IntFormat, columns: int = 512) -> tuple[torch.Tensor, QTensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, columns, generator=generator)
    x = torch.randn(5, columns, generator=generator) * torch.linspace(0.1, 5, columns)
    x[1], x[2] = x[1].abs(), -x[2].abs()
    return x, format.quantize(weight, format.qparams(weight))


def error(got: torch.Tensor, x: torch.Tensor, q: QTensor) -> float:
    wanted = x.double() @ q.dequantize().double().T
    return float((got.double() - wanted).norm() / wanted.norm())


def packed(values: torch.Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Unsigned values in bytes along the last axis, low bits first."""
    each = 8 // bits
    whole = torch.nn.functional.pad(values.int(), (0, -values.shape[-1] % each)).unflatten(-1, (-1, each))
    return (whole << bits * torch.arange(each)).sum(-1).to(torch.uint8).numpy()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(4, 16), (4, 32), (4, 128), (8, 32), (8, 64), (2, 16), (2, 32)])
def test_onnxruntime_multiplies_with_these_inputs(bits: int, size: int, symmetric: bool) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    format = IntFormat(bits, size, symmetric)
    x, q = problem(format)
    inputs = {
        "B": packed(q.codes, bits).reshape(64, -1, size * bits // 8),
        "scales": q.qparams.scale.numpy(),
        **({} if symmetric else {"zeros": packed(q.qparams.zero, bits)}),
    }
    options = {"K": 512, "N": 64, "bits": bits, "block_size": size, "accuracy_level": 4}
    node = onnx.helper.make_node("MatMulNBits", ["A", *inputs], ["Y"], domain="com.microsoft", **options)
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("A", "Y")]
    held = [onnx.numpy_helper.from_array(value, name) for name, value in inputs.items()]
    graph = onnx.helper.make_graph([node], "one", ends[:1], ends[1:], held)
    sets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"A": x.numpy()})[0])
    assert error(got, RuntimeInput("onnxruntime", format).fake_quant(x), q) < SUM
    assert (bits == 2 and size == 16) or error(got, x, q) > 1e-3


@pytest.mark.parametrize(("kind", "size"), [("q8_0", 32), ("q8_K", 256)])
def test_llama_cpps_own_function_gives_these_blocks(kind: str, size: int) -> None:
    llama = pytest.importorskip("llama_cpp")
    folder = Path(llama.__file__).parent / "lib"
    ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    function = getattr(ctypes.CDLL(str(folder / "libggml-cpu.so")), f"quantize_row_{kind}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    layouts = {"q8_0": [("d", "<f2"), ("q", "i1", 32)], "q8_K": [("d", "<f4"), ("q", "i1", 256), ("s", "<i2", 16)]}
    block = np.dtype(layouts[kind])
    x, _ = problem(IntFormat(4, 32))
    blocks = np.zeros(x.numel() // size, block)
    function(x.numpy().ctypes.data, blocks.ctypes.data, x.numel())
    got = torch.from_numpy(blocks["q"].astype(np.float32) * blocks["d"].astype(np.float32)[:, None])
    assert torch.equal(got.view(x.shape), q8_0(x) if kind == "q8_0" else q8_k(x))


@pytest.mark.heavy
def test_xnnpack_multiplies_with_these_inputs(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    ao = pytest.importorskip("torchao.quantization")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    format = IntFormat(4, 32, scale_dtype=torch.bfloat16)
    x, q = problem(format)
    weight = ao.IntxUnpackedToInt8Tensor(
        (q.codes.int() - 8).to(torch.int8), q.qparams.scale, torch.zeros_like(q.qparams.zero, dtype=torch.int8),
        target_dtype=torch.int4, block_size=(1, 32), dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )  # fmt: skip
    linear = torch.nn.Linear(512, 64, bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    exported = torch.export.export(torch.nn.Sequential(linear), (x,))
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    (tmp_path / "one.pte").write_bytes(program.buffer)
    (got,) = Runtime.get().load_program(str(tmp_path / "one.pte")).load_method("forward").execute([x])
    assert error(got, RuntimeInput("executorch", format).fake_quant(x), q) < SUM
    assert error(got, x, q) > 1e-3
