"""Floating-point activations equal those of compressed-tensors, operation for operation."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.quant.float_activations import FLOAT_ACTS, MXFP4_ACTS, FloatActs

ARGS = {
    "fp8": {"num_bits": 8, "strategy": "token"},
    "fp8-group": {"num_bits": 8, "strategy": "group", "group_size": 128},
    "mxfp8": {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp6": {"num_bits": 6, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}


def theirs(x: torch.Tensor, name: str) -> torch.Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(type="float", symmetric=True, dynamic=True, **ARGS[name])
    scale, zero = compute_dynamic_scales_and_zp(value=x, args=args, module=torch.nn.Linear(1, 1))
    return fake_quantize(x, scale, zero, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FLOAT_ACTS)
def test_as_compressed_tensors_does(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1] *= 300
    x[0, 2] *= 1e-3
    x[1, 3, :32] = 6.5
    assert torch.equal(FLOAT_ACTS[name].fake_quant(x), theirs(x, name))


@pytest.mark.parametrize("format", FLOAT_ACTS.values(), ids=lambda format: format.name)
def test_zeros_and_gradients(format: FloatActs) -> None:
    assert not bool(format.fake_quant(torch.zeros(1, 2, 256)).any())
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    format.fake_quant(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert float(x.grad.abs().sum()) > 0


def test_widths() -> None:
    MXFP4_ACTS.check_width(64)
    FLOAT_ACTS["fp8"].check_width(50)
    with pytest.raises(LowbitError, match="groups of 32, which do not divide a width of 80"):
        MXFP4_ACTS.check_width(80)
