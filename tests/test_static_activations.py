"""Static input formats: the arithmetic of compressed-tensors bit for bit, gradients, and what is stored."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize

from lowbit.errors import LowbitError
from lowbit.quant.compressed_tensors import inputs_args
from lowbit.quant.elements import E4M3
from lowbit.quant.static_activations import NVFP4_ACTS, Nvfp4Acts, StaticActs, StaticInt, quantize_input

INTEGERS = [StaticInt(bits, symmetric) for bits in (4, 8, 16) for symmetric in (True, False)]
FORMATS = [*INTEGERS, NVFP4_ACTS]


def inputs() -> torch.Tensor:
    """Hidden states ``(3, 40, 64)`` with zeros, tiny and huge tokens."""
    x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0
    x[0, 1] *= 1e-6
    x[0, 2] *= 300
    x[0, 3, :16] = 0
    x[1, :, 16:32] *= 1e-3
    return x


def ends(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.amin().float().reshape(1), x.amax().float().reshape(1)


def library(x: torch.Tensor, format: StaticActs, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """What stock compressed-tensors makes of ``x`` with a linear's stored tensors."""
    linear = torch.nn.Linear(64, 1)
    linear.quantization_status = QuantizationStatus.COMPRESSED
    for name, value in stored.items():
        linear.register_buffer(name, value)
    result: torch.Tensor = forward_quantize(linear, x, "input", QuantizationArgs(**inputs_args(format)))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_as_compressed_tensors_does_with_what_is_stored(format: StaticActs, dtype: torch.dtype) -> None:
    x = inputs().to(dtype)
    low, high = ends(x[1])  # some values of the others are clipped
    qparams = format.qparams(low, high)
    stored = format.pack(qparams)
    if dtype != torch.float32 and isinstance(format, StaticInt):
        stored["input_scale"] = stored["input_scale"].to(dtype)  # as a model of that dtype holds it
    found = format.on_qparams(x, qparams)
    assert torch.equal(found, library(x, format, stored))
    assert not torch.equal(found, x)
    assert found.dtype == dtype


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_stored_qparams_come_back_as_they_are(format: StaticActs) -> None:
    for low, high in ((-1.2, 2.6), (0.0, 3.0), (-3.0, 0.0), (0.0, 0.0), (-1e-20, 1e-22), (-1e20, 7.0)):
        qparams = format.qparams(torch.tensor([low]), torch.tensor([high]))
        stored = format.pack(qparams)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
            name: (due.dtype, due.shape) for name, due in format.tensors.items()
        }
        back = format.unpack(stored)
        assert torch.equal(back.scale, qparams.scale)
        assert torch.equal(back.zero, qparams.zero)
        assert not bool(format.on_qparams(torch.zeros(2, 32), qparams).any())


@pytest.mark.parametrize("format", INTEGERS, ids=lambda format: format.name)
def test_no_value_of_the_range_is_off_by_more_than_half_a_step(format: StaticInt) -> None:
    x = torch.linspace(-1.2, 2.6, 1001)
    qparams = format.qparams(torch.tensor([-1.2]), torch.tensor([2.6]))
    error = (format.on_qparams(x, qparams) - x).abs().max()
    # The zero point is rounded, which moves an end by up to half a step more.
    assert error <= 1.001 * qparams.scale
    low, high = format.range_of(qparams)
    assert torch.allclose(format.qparams(low, high).scale, qparams.scale)
    assert torch.equal(format.qparams(low, high).zero, qparams.zero)


def test_the_power_of_two_of_nvfp4_keeps_the_largest_scale_within_e4m3() -> None:
    for peak in (1e-3, 0.9, 1.0, 2687.9, 2688.0, 2689.0, 1e5):
        qparams = NVFP4_ACTS.qparams(torch.tensor([-peak]), torch.tensor([0.0]))
        largest = peak / 6 / float(qparams.scale)
        assert E4M3.largest / 2 < largest <= E4M3.largest * 1.001


@pytest.mark.parametrize("format", INTEGERS, ids=lambda format: format.name)
def test_gradients_reach_the_input_and_the_ends_of_the_range(format: StaticInt) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    low, high = torch.tensor([-1.0], requires_grad=True), torch.tensor([1.5], requires_grad=True)
    (format.on_qparams(x, format.qparams(low, high)) * torch.linspace(1, 2, 64)).sum().backward()
    assert x.grad is not None
    assert high.grad is not None
    assert bool((x.grad[(x > -1) & (x < 1.4)] != 0).all())
    assert float(x.grad[x > 1.6].abs().sum()) == 0  # clipped
    assert float(high.grad) != 0
    if not format.symmetric:
        assert low.grad is not None
        assert float(low.grad) != 0


def test_gradients_of_nvfp4_are_finite_and_pass() -> None:
    x = inputs().requires_grad_()
    NVFP4_ACTS.on_qparams(x, NVFP4_ACTS.qparams(*ends(x.detach()))).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_without_qparams_the_range_is_that_of_the_values(format: StaticActs) -> None:
    x = inputs()[1]
    qparams = format.qparams(*ends(x))
    assert torch.equal(quantize_input(x, format, None), format.on_qparams(x, qparams))
    assert torch.equal(quantize_input(x, format, qparams), format.on_qparams(x, qparams))


BROKEN = [
    (StaticInt(8, False), {"input_scale": [float("nan")], "input_zero_point": [0]}, "input_scale is nan"),
    (StaticInt(8, False), {"input_scale": [0.0], "input_zero_point": [0]}, "a positive number is allowed"),
    (StaticInt(8, True), {"input_scale": [float("inf")]}, "input_scale is inf"),
    (StaticInt(4, False), {"input_scale": [1.0], "input_zero_point": [100]}, "-8 to 7 are allowed"),
    (NVFP4_ACTS, {"input_global_scale": [3.0]}, "powers of two"),
    (NVFP4_ACTS, {"input_global_scale": [-2.0]}, "powers of two"),
    (NVFP4_ACTS, {"input_global_scale": [0.0]}, "powers of two"),
    (NVFP4_ACTS, {"input_global_scale": [2.0**120]}, "powers of two"),
]


@pytest.mark.parametrize(("format", "stored", "message"), BROKEN)
def test_numbers_that_no_range_has_are_refused(
    format: StaticActs, stored: dict[str, list[float]], message: str
) -> None:
    tensors = {name: torch.tensor(value, dtype=format.tensors[name].dtype) for name, value in stored.items()}
    with pytest.raises(ValueError, match=message):
        format.unpack(tensors)


def test_widths_and_bits() -> None:
    Nvfp4Acts().check_width(48)
    with pytest.raises(LowbitError, match="groups of 16, which do not divide a width of 40"):
        NVFP4_ACTS.check_width(40)
    with pytest.raises(LowbitError, match="17 bits given; 2 to 16 are allowed"):
        StaticInt(17, True)
