"""Formats of activations: the arithmetic of compressed-tensors bit for bit, gradients, clipping, and their flags."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from lowbit.errors import LowbitError
from lowbit.quant.activations import ActFormat, IntTokens, token_ends
from lowbit.quant.integer import IntFormat
from lowbit.quant.runtimes import RUNTIMES, RuntimeInput


def library(x, bits, symmetric):
    """What stock compressed-tensors makes of ``x`` ``(sequences, tokens, width)``."""
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    return fake_quantize(x, scale, zero, args)


def tokens(width=48):
    x = torch.randn(3, 17, width, generator=torch.Generator().manual_seed(9))
    x[0, 0] = 0
    x[0, 1] = torch.arange(width) % 16 * 0.5 - 3.5  # multiples of half a step: ties
    x[0, 2] = x[0, 2].abs()
    x[0, 3] = -x[0, 3].abs()
    x[0, 4] = 0.123
    x[0, 5] *= 1e-30
    x[0, 6] *= 1e30
    x[0, 7, 1:] = 0
    x[0, 8] = torch.arange(width) * 1.0  # more ties, far from zero
    x[1] *= torch.logspace(-2, 2, 17)[:, None]
    return x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_activations_are_quantized_as_compressed_tensors_does_bit_for_bit(bits, symmetric):
    x, format, levels = tokens(), IntTokens(bits, symmetric), 2**bits - 1
    assert torch.equal(format.fake_quant(x), library(x, bits, symmetric))
    assert not torch.equal(format.fake_quant(x), x)
    # Scale 1, zero odd, every value half way between two codes: the zero has to be added before the rounding.
    low = 3.0 if not symmetric else levels / 2
    halves = torch.arange(-3, levels - 3)[None, None] + 0.5
    ties = torch.cat([halves, torch.tensor([[[-low, levels - low]]])], -1)
    assert torch.equal(format.fake_quant(ties), library(ties, bits, symmetric))
    many = torch.randn(8, 512, 48, generator=torch.Generator().manual_seed(10))
    assert torch.equal(format.fake_quant(many), library(many, bits, symmetric))
    heads = many.unflatten(-1, (3, 16)).transpose(1, 2)  # (sequences, heads, tokens, dim)
    assert torch.equal(format.fake_quant(heads).flatten(0, 1), library(heads.flatten(0, 1), bits, symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_gradients_pass_the_rounding_and_reach_the_range(symmetric):
    x = torch.tensor([[-1.0, 0.3, 0.55, 2.0]], dtype=torch.float64, requires_grad=True)
    IntTokens(4, symmetric).fake_quant(x)[0, 1].backward()
    scale = 2 / 7.5 if symmetric else 3 / 15
    residue = round(0.3 / scale) - 0.3 / scale  # d y / d scale
    wanted = [0.0, 1.0, 0.0, residue / 7.5] if symmetric else [-residue / 15, 1.0, 0.0, residue / 15]
    assert x.grad[0].tolist() == pytest.approx(wanted, abs=1e-12)


def test_a_range_and_its_codes_by_hand():
    x = torch.tensor([[-1.0, 0.5, 2.0], [0.0, 0.0, 0.0]])
    low, high = token_ends(x)
    assert (low.flatten().tolist(), high.flatten().tolist()) == ([-1.0, 0.0], [2.0, 0.0])
    format = IntTokens(2, symmetric=False)
    scale, zero = format.from_range(low, high)
    assert scale.flatten().tolist() == [1.0, torch.finfo(torch.float32).eps]  # no range: any scale gives zeros
    assert zero.flatten().tolist() == [-1.0, -2.0]  # signed codes -2 .. 1
    assert format.on_range(x, scale, zero, None).tolist() == [[-1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]  # 0.5 - 1: a tie
    scale, zero = IntTokens(2, symmetric=True).from_range(low, high)
    assert scale[0].item() == pytest.approx(2 / 1.5)
    assert zero is None


def test_clipped_ranges_clip():
    x = torch.tensor([[-1.0, -0.2, 0.5, 3.0]])
    format = IntTokens(4, symmetric=False)
    assert torch.equal(format.fake_quant(x, 1.0, 1.0), format.fake_quant(x))
    clipped = format.fake_quant(x, torch.tensor(0.5), torch.tensor(0.5))
    step = 2.0 / 15  # the range is -0.5 to 1.5
    assert float(clipped.max()) == pytest.approx(1.5, abs=step)
    assert float(clipped.min()) == pytest.approx(-0.5, abs=step)
    assert abs(float(clipped[0, 2]) - 0.5) <= step / 2 + 1e-6
    symmetric = IntTokens(4, symmetric=True).fake_quant(x, 1.0, torch.tensor(0.5))
    assert float(symmetric.max()) == pytest.approx(1.5, abs=0.2)


def test_an_offset_decides_what_is_rounded_up():
    x = torch.tensor([[-7.5, 0.4, 0.4, 7.5]])  # symmetric at 4 bits: scale 1
    offset = torch.tensor([0.0, 0.2, 0.0, 0.0])
    assert IntTokens(4, symmetric=True).fake_quant(x, offset=offset).tolist() == [[-8.0, 1.0, 0.0, 7.0]]


def test_bits_that_make_no_sense_are_refused():
    for bits in (1, 9):
        with pytest.raises(LowbitError, match=f"{bits} bits given; 2 to 8 are allowed"):
            IntTokens(bits, symmetric=True)


@pytest.mark.parametrize(
    ("format", "name", "independent_ends", "clippable"),
    [
        (IntTokens(8, symmetric=False), "a8-asym", True, True),
        (IntTokens(4, symmetric=True), "a4-sym", False, True),
        *((RuntimeInput(name, IntFormat(4, 32)), name, False, False) for name, it in RUNTIMES.items() if it.round),
    ],
)
def test_a_format_says_what_methods_may_do_with_its_ranges(
    format: ActFormat, name: str, independent_ends: bool, clippable: bool
) -> None:
    assert (format.name, format.independent_ends, format.clippable) == (name, independent_ends, clippable)
    x = tokens(64)[1]
    got = format.fake_quant(x)
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    assert not torch.equal(got, x)
    assert hash(format) == hash(type(format)(*vars(format).values()))  # linears with one format share its result
