"""The runtimes' quantization of inputs against literal loops, and runs that are made for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from formats import Ternary
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.exporters.gguf_blocks import block_type
from lowbit.models.forward import run as run_block
from lowbit.quant.activations import IntTokens
from lowbit.quant.integer import IntFormat
from lowbit.quant.runtimes import K_TYPES, RUNTIMES, RuntimeInput, blocks_of, q8_0, q8_k, qd8
from lowbit.quant.scheme import for_runtime
from lowbit.quant.scheme_files import scheme_from_dict, scheme_to_dict
from lowbit.quant.scheme_names import parse_scheme
from lowbit.runs.manifest import Manifest, StockLoading, manifest_of
from lowbit.runs.streamed_model import StreamedModel
from tiny import block_of, planned, quantized, save_tiny, tiny_ids, tiny_model

F = np.float32


def values(columns: int) -> torch.Tensor:
    """Rows with outliers, ties, zeros, one sign only."""
    x = torch.randn(8, columns, generator=torch.Generator().manual_seed(0))
    x[1, 5] = 90.0
    x[2] = x[2].abs()
    x[3] = -x[3].abs()
    x[4] = 0.0
    x[5] = torch.arange(columns).float() - 0.5 * columns
    x[6, : columns // 2] *= 1e-5
    x[7] = (torch.arange(columns) % 255).float() / 2  # halves of a step where absmax is 127
    return x


def rint(value: np.float32) -> int:
    return int(np.rint(value))  # ties to even, as _mm256_round_ps and lrintf do


def test_llama_cpps_blocks_are_those_of_a_literal_loop() -> None:
    x = values(96)
    got = q8_0(x)
    for row in range(len(x)):
        for start in range(0, 96, 32):
            block = x[row, start : start + 32].numpy()
            most = F(max(abs(value) for value in block))
            scale = np.float16(most / F(127))
            factor = F(127) / most if most else F(0)
            for place, value in enumerate(block):
                assert float(got[row, start + place]) == F(rint(value * factor)) * F(scale)


def test_llama_cpps_super_blocks_are_those_of_a_literal_loop() -> None:
    x = values(512)
    got = q8_k(x)
    for row in range(len(x)):
        for start in (0, 256):
            block = x[row, start : start + 256].numpy()
            most = max(block, key=abs)
            if most == 0:
                assert not got[row, start : start + 256].any()
                continue
            factor = F(-127) / most
            scale = F(1) / factor
            for place, value in enumerate(block):
                assert float(got[row, start + place]) == F(min(127, rint(factor * value))) * scale


@pytest.mark.parametrize(("columns", "size"), [(96, 32), (96, 16), (96, 64), (200, 128)])
def test_onnxruntimes_blocks_are_those_of_a_literal_loop(columns: int, size: int) -> None:
    x = values(columns)
    got = blocks_of(x, size)
    for row in range(len(x)):
        for start in range(0, columns, size):
            block = x[row, start : start + size].numpy()
            most = F(max(abs(value) for value in block))
            factor = F(127) / most if most else F(0)
            for place, value in enumerate(block):
                assert float(got[row, start + place]) == F(rint(value * factor)) * (most / F(127))


def test_xnnpacks_rows_are_those_of_a_literal_loop() -> None:
    x = values(96)
    got = qd8(x)
    for row in range(len(x)):
        numbers = x[row].numpy()
        low, high = min(F(0), numbers.min()), max(F(0), numbers.max())
        factor = F(1) if low == high else F(255) / (high - low)
        from_low, from_high = F(-128) + low * factor, F(127) + high * factor
        zero = F(-128) - low * factor if from_low + from_high > 0 else F(127) - high * factor
        zero = rint(min(max(zero, F(-128)), F(127)))
        for place, value in enumerate(numbers):
            code = min(max(rint(value * factor) + zero, -128), 127)
            assert float(got[row, place]) == F(code - zero) * (F(1) / factor)


@pytest.mark.parametrize("name", ["llama.cpp", "executorch", "onnxruntime"])
def test_gradients_pass_and_zeros_give_none_that_is_nan(name: str) -> None:
    x = values(64).requires_grad_()
    RuntimeInput(name, IntFormat(4, 32)).fake_quant(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad[0] != 0).any())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_k_types_are_the_exporters(bits: int, symmetric: bool) -> None:
    wide = str(getattr(block_type(IntFormat(bits, 256, symmetric), 512), "name", ""))
    assert wide.endswith("_K") == ((bits, symmetric) in K_TYPES)
    x = values(512)
    got = RuntimeInput("llama.cpp", IntFormat(bits, 256, symmetric)).fake_quant(x)
    assert torch.equal(got, q8_k(x) if (bits, symmetric) in K_TYPES else q8_0(x))


def test_widths_of_two_bits_have_no_int8_kernel_everywhere() -> None:
    x = values(512)
    assert torch.equal(RuntimeInput("onnxruntime", IntFormat(2, 16)).fake_quant(x), x)
    assert torch.equal(RuntimeInput("onnxruntime", IntFormat(2, 32)).fake_quant(x), blocks_of(x, 32))


def test_a_runtime_computes_inputs_in_float32() -> None:
    x, format = values(64).to(torch.bfloat16), RuntimeInput("llama.cpp", IntFormat(4, 32))
    assert torch.equal(format.fake_quant(x), q8_0(x.float()).to(torch.bfloat16))
    assert format.fake_quant(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", [name for name, runtime in RUNTIMES.items() if runtime.round])
def test_weights_in_a_format_that_is_not_known_are_refused(name: str) -> None:
    with pytest.raises(LowbitError, match=f"^{name} with ternary weights: its input quantization is not known$"):
        RuntimeInput(name, Ternary())


def test_a_scheme_says_what_it_runs_on() -> None:
    scheme = for_runtime(parse_scheme("w4a16g32-sym"), "executorch")
    assert scheme.weight.scale_dtype == torch.bfloat16
    assert scheme_from_dict(scheme_to_dict(scheme)) == scheme
    assert scheme.module("model.layers.0.mlp.up_proj").input == RuntimeInput("executorch", scheme.weight)
    assert for_runtime(parse_scheme("w4a16"), "vllm").module("x").input is None
    assert for_runtime(parse_scheme("w4a8-sym"), "vllm").module("x").input == IntTokens(8, symmetric=True)
    assert "target" not in scheme_to_dict(parse_scheme("w4a16"))
    with pytest.raises(LowbitError, match=r"unknown runtime 'llamacpp': did you mean 'llama.cpp'"):
        for_runtime(parse_scheme("w4a16"), "llamacpp")


def test_a_block_sees_the_runtimes_inputs() -> None:
    block, x = block_of(tiny_model("llama"))
    seen: dict[str, torch.Tensor] = {}
    taps = {name: lambda value, name=name: seen.__setitem__(name, value) for name in block.linears()}
    scheme = for_runtime(parse_scheme("w4a16g32-sym"), "llama.cpp")
    run_block(planned(block, scheme), x, quantized=True, taps=taps)
    floats: dict[str, torch.Tensor] = {}
    run_block(block, x, taps={"0.self_attn.q_proj": lambda value: floats.__setitem__("q", value)})
    assert torch.equal(seen["0.self_attn.q_proj"], q8_0(floats["q"]))
    assert seen["0.self_attn.q_proj"] is seen["0.self_attn.k_proj"]
    for value in seen.values():
        assert torch.allclose(q8_0(value), value, rtol=2e-3, atol=1e-4)
        assert not torch.equal(value, torch.zeros_like(value))


def finished(folder: Path) -> Manifest:
    manifest = manifest_of(folder)
    assert manifest is not None
    return manifest


def logits(folder: Path) -> dict[str, torch.Tensor]:
    ids = tiny_ids(2)
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ((_, streamed),) = StreamedModel(folder).logits(ids)
        return {"stock": stock(ids).logits, "load": lowbit.load(folder)(ids).logits, "streamed": streamed}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("for"), None, target="llama.cpp", recipe="gptq")


def test_a_run_for_llama_cpp_takes_its_scheme_and_its_arithmetic(made: Path) -> None:
    manifest = finished(made)
    assert manifest.identity.scheme == {"scheme": "w4a16g32-sym", "overrides": [], "target": "llama.cpp"}
    assert manifest.transformers.loads
    assert "llama.cpp: int8 blocks of 32" in str(manifest.transformers.inputs)
    assert "computes with float inputs" in (made / "README.md").read_text()
    found = logits(made)
    scale = float(found["load"].abs().max())
    assert torch.allclose(found["load"], found["streamed"], atol=1e-5 * scale)
    gap = float((found["stock"] - found["load"]).abs().max())
    assert 1e-4 * scale < gap < 0.1 * scale


def test_inputs_can_be_those_of_another_runtime_or_float(made: Path) -> None:
    ids = tiny_ids(2)
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)(ids).logits
        assert torch.allclose(lowbit.load(made, target="float")(ids).logits, stock, atol=1e-5)
        xnnpack = lowbit.load(made, target="executorch")(ids).logits
        assert not torch.allclose(xnnpack, stock, atol=1e-4)
        assert torch.equal(lowbit.load(made, target="llama.cpp")(ids).logits, lowbit.load(made)(ids).logits)
    text = str(made.parent / "model" / "calib.txt")
    found = {
        name: lowbit.evaluate(str(made), data=text, length=32, tokens=640, target=name)
        for name in (None, "float", "onnxruntime")
    }
    assert [one.target for one in found.values()] == ["llama.cpp", None, "onnxruntime"]
    assert len({one.perplexity[text] for one in found.values()}) == 3


def test_rounding_inputs_that_are_float_or_rounded_already_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="this is a float model"):
        lowbit.load(made.parent / "model", target="llama.cpp")
    with pytest.raises(LowbitError, match="scheme w4a8, which has its own input format"):
        lowbit.load(quantized(tmp_path, "w4a8"), target="llama.cpp")


def test_methods_calibrate_on_what_will_run(made: Path, tmp_path: Path) -> None:
    plain = quantized(tmp_path, "w4a16g32-sym", recipe="gptq")
    name = "model.layers.2.mlp.down_proj.weight_packed"
    ours, theirs = (Checkpoint(folder).read([name])[name] for folder in (made, plain))
    assert not torch.equal(ours, theirs)


def test_it_exports_and_verifies(made: Path, tmp_path: Path) -> None:
    for target in ("gguf", "gptq", "vllm"):
        out = tmp_path / f"out{'.gguf' if target == 'gguf' else target}"
        assert lowbit.verify(made, [lowbit.export(made, target, out=out).out])[0].ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "w4a4"], r"llama.cpp does not support scheme w4a4, act: .*nearest that fits: w4a16-asym$"),
        (["--recipe", "qllm"], r"recipe: reassemble leaves gathers after norms at run time"),
        (["--recipe", "affinequant", "--set", "affinequant.mlp=matrix"], r"affinequant leaves matrices after norms"),
        (["--override", "*.down_proj=w4g16"], r"override \*\.down_proj: .*--override '\*\.down_proj=w4g32-sym'$"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_carry_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    save_tiny(tmp_path / "model", "llama")
    text, out = str(tmp_path / "model" / "calib.txt"), tmp_path / "run"
    sizes = ["--data", text, "--samples", "2", "--length", "16", "--recipe", "rtn"]
    assert (
        call(["quantize", str(tmp_path / "model"), "--out", str(out), "--target", "llama.cpp", *sizes, *options]) == 2
    )
    said = capsys.readouterr().err
    assert re.search(message, said.strip().splitlines()[-1])
    assert not out.exists()


def test_the_recipe_is_named_where_only_the_larger_groups_fail_by_their_size(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"vllm does not support .*, recipe: reassemble leaves gathers after norms"):
        quantized(tmp_path, None, recipe="qllm", target="vllm")
    assert not (tmp_path / "run").exists()


def test_an_unknown_runtime_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"unknown runtime 'vlm': did you mean 'vllm'"):
        lowbit.quantize(str(tmp_path), tmp_path / "run", target="vlm")


def test_the_best_default_that_divides_the_widths_is_taken(tmp_path: Path) -> None:
    # 64 and 96 wide: neither 128 nor 64 divides both.
    folder = quantized(tmp_path, None, target="vllm")
    manifest = finished(folder)
    assert manifest.identity.scheme["scheme"] == "w4a16g32-sym"
    assert manifest.transformers.inputs is None
    found = logits(folder)
    assert torch.allclose(found["stock"], found["load"], atol=1e-5)


def test_vllm_takes_activations_that_its_kernels_round(tmp_path: Path) -> None:
    folder = quantized(tmp_path, "w4a8g32-sym", target="vllm")
    assert finished(folder).transformers == StockLoading(loads=True)
    with pytest.raises(LowbitError, match=r"vllm does not support scheme w4a8, act: .*nearest that fits: w4a8-sym$"):
        quantized(tmp_path / "other", "w4a8", target="vllm")


def test_a_run_for_executorch_rounds_its_scales_to_xnnpacks(tmp_path: Path) -> None:
    folder = quantized(tmp_path, None, target="executorch")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    scale = Checkpoint(folder).read([name])[name]
    assert scale.dtype == torch.bfloat16
    found = logits(folder)
    assert torch.allclose(found["load"], found["streamed"], atol=1e-4)
    with torch.no_grad():  # the same weights, bit for bit, in stock transformers: what differs is the inputs
        weights = lowbit.load(folder, target="float")
        assert torch.allclose(weights(tiny_ids(2)).logits, found["stock"], atol=1e-4)
    with pytest.raises(LowbitError, match=r"gptq does not support .*scales are torch.bfloat16"):
        lowbit.export(folder, "gptq")


def test_a_run_for_onnxruntime_takes_its_blocks(tmp_path: Path) -> None:
    folder = quantized(tmp_path, None, target="onnxruntime")
    scheme = finished(folder).identity.scheme
    assert scheme == {"scheme": "w4a16g32-sym", "overrides": [], "target": "onnxruntime"}
    with pytest.raises(LowbitError, match=r"onnxruntime does not support scheme w4a4, act: "):
        quantized(tmp_path / "other", "w4a4", target="onnxruntime")


def test_another_runtime_is_another_run(made: Path) -> None:
    more: dict[str, Any] = {"data": str(made.parent / "model" / "calib.txt"), "samples": 2, "length": 16}
    with pytest.raises(LowbitError, match=r"scheme.target is llama.cpp, this one's vllm"):
        lowbit.quantize(
            str(made.parent / "model"),
            made,
            scheme="w4a16g32-sym",
            recipe="gptq",
            effort="quick",
            target="vllm",
            **more,
        )
