"""The kernel that quantizes a weight, against plain operations: the same bits, and the same gradients."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interpreted import DEVICE, INSTALLED, needs_triton
from lowbit.errors import LowbitError
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.deferred_maps import deferrable
from lowbit.methods.options import with_options
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.models.skeleton import Skeleton
from lowbit.quant import weight_kernel
from lowbit.quant.floating import MXFP4
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme_files import load_scheme
from lowbit.quant.weight_kernel import Diagonals, fake_quant, naive
from lowbit.runs.plan import make_plan
from tiny import tiny_ids, tiny_model

KINDS = [
    (group, symmetric, dtype)
    for group in (16, 48, None)
    for symmetric in (True, False)
    for dtype in (torch.float16, torch.float32)
]
FORMATS = [IntFormat((2, 3, 4, 8, 5)[at % 5], *kind) for at, kind in enumerate(KINDS)]
HEIGHT, WIDTH = 38, 96  # rows that no tile divides


def name_of(format):
    return f"{format.name}-{str(format.scale_dtype).removeprefix('torch.')}"


def weight_of(width=WIDTH, seed=0):
    """Random rows, and some that are zero, tiny, huge, of one sign, symmetric, and with ties at both ends."""
    weight = torch.randn(HEIGHT, width, generator=torch.Generator().manual_seed(seed)) / 8
    weight[1] = 0
    weight[2] *= 1e-30
    weight[3] *= 1e6
    weight[4] = weight[4].abs()
    weight[5] = -weight[5].abs() - 0.1
    weight[6, ::2], weight[6, 1::2] = 0.5, -0.5
    weight[7] = weight[7].mul(8).round().div(8)
    return weight.to(DEVICE)


def tensors_of(format, width=WIDTH):
    """Weight, factors of columns and rows, both ratios: leaves."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return (0.2 * torch.randn(*shape, generator=generator)).exp().to(DEVICE)

    ratios = [drawn(HEIGHT, format.groups(width)) * 0.9 for _ in range(2)]
    return [own.requires_grad_() for own in (weight_of(width), drawn(width), drawn(HEIGHT), *ratios)]


@needs_triton
@pytest.mark.parametrize("maps", ["neither", "columns", "rows", "both"])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_the_kernel_is_the_plain_form_bit_for_bit(format, maps):
    weight, columns, rows, low, high = (own.detach() for own in tensors_of(format))
    chosen = Diagonals(columns if maps in ("columns", "both") else None, rows if maps in ("rows", "both") else None)
    assert torch.equal(fake_quant(weight, format, low, high, chosen), naive(weight, format, low, high, chosen))


@needs_triton
@pytest.mark.parametrize("format", [IntFormat(4), IntFormat(3, None, False)], ids=name_of)
def test_a_row_of_several_chunks_is_the_plain_form(format):
    tensors = tensors_of(format, 1500)
    weight, columns, rows, low, high = tensors
    found = fake_quant(weight, format, low, high, Diagonals(columns, rows))
    wanted = naive(weight, format, low, high, Diagonals(columns, rows))
    assert torch.equal(found, wanted)
    compare_gradients(tensors, found, wanted)


def compare_gradients(tensors, found, wanted):
    """Within the rounding of sums in float32: over a group, a row or a column of at most 1,500 values.

    Each term is right to some roundings of 2**-24, a sum of n to n of them: 1500 * 6e-8 = 9e-5 of the largest sum.
    """
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(found.device)
    upstream[3] /= 1e6  # otherwise the row of huge values hides all others in the columns' sums
    ours = torch.autograd.grad(found, tensors, upstream)
    plain = torch.autograd.grad(wanted, tensors, upstream)
    for own, expected in zip(ours, plain, strict=True):
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)


@needs_triton
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_gradients_are_those_of_the_plain_form(format):
    tensors = tensors_of(format)
    weight, columns, rows, low, high = tensors
    maps = Diagonals(columns, rows)
    compare_gradients(tensors, fake_quant(weight, format, low, high, maps), naive(weight, format, low, high, maps))


@needs_triton
def test_gradients_are_the_same_at_every_call():
    format = IntFormat(3, 16, False)
    tensors = tensors_of(format)
    weight, columns, rows, low, high = tensors

    def gradients():
        out = fake_quant(weight, format, low, high, Diagonals(columns, rows))
        return torch.autograd.grad(out.square().sum(), tensors)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@needs_triton
def test_without_maps_ratios_are_numbers_and_the_weight_need_not_have_a_gradient():
    format = IntFormat(4, 16, False)
    weight, low = weight_of(), torch.full((HEIGHT, 6), 0.8, device=DEVICE, requires_grad=True)
    assert torch.equal(fake_quant(weight, format), naive(weight, format))
    found, wanted = fake_quant(weight, format, low, 0.9), naive(weight, format, low, 0.9)
    compare_gradients([low], found, wanted)


@needs_triton
def test_within_on_formats_take_it_and_elsewhere_they_do_not(monkeypatch):
    taken = []
    kernel = weight_kernel.fake_quant
    monkeypatch.setattr(weight_kernel, "fake_quant", lambda *given: taken.append(given) or kernel(*given))
    weight, format = weight_of(), IntFormat(4, 16)
    plain = format.fake_quant_clipped(weight, 0.9, 0.8)
    assert not taken
    with weight_kernel.on(DEVICE):
        assert torch.equal(format.fake_quant_clipped(weight, 0.9, 0.8), plain)
        assert len(taken) == 1
        format.fake_quant_clipped(weight.double())
        MXFP4.fake_quant_clipped(weight)
    assert len(taken) == 1
    format.fake_quant_clipped(weight)
    assert len(taken) == 1


@needs_triton
def test_a_width_that_groups_do_not_divide_is_refused():
    with pytest.raises(LowbitError, match="does not divide a width of 96"):
        fake_quant(weight_of(), IntFormat(4, 64))


def test_what_kernels_need_is_asked_for_before_any_work(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LowbitError, match="pip install triton"), weight_kernel.on():
        pass
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(LowbitError, match="use --device cuda, or set TRITON_INTERPRET=1"), weight_kernel.on("cpu"):
        pass
    with weight_kernel.on("cuda:0"):
        assert weight_kernel.within()
    assert not weight_kernel.within()


MLP = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
QK = ["self_attn.k_proj", "self_attn.q_proj"]


def fit_of(name, scheme, **options):
    """The fit of a tiny model's first block."""
    model = tiny_model(name)
    skeleton = Skeleton(model.config)
    skeleton.fill({n: p for n, p in model.state_dict().items() if n in skeleton.shared_names})
    plan = make_plan(skeleton, load_scheme(scheme))
    x = skeleton.embed(tiny_ids(4, 16)).to(DEVICE)
    own = {n: model.model.layers[0].get_parameter(n).detach().to(DEVICE) for n in skeleton.parameter_shapes(0)}
    block = skeleton.block(0, {f"0.{n}": p for n, p in own.items()}, 1, plan.formats)
    step = with_options(AffineQuant(), signs=False, **options)
    calib = Calib(x, x, run_all(block, x))
    fit = AffineFit(step.sites, step.maps, step.clipping, step.objective, step.schedule, block, calib)
    fit.begin(step.schedule.epochs)
    generator = torch.Generator().manual_seed(3)
    for leaf in (leaf for group, _ in fit.groups() for leaf in group):
        leaf.data += 0.05 * torch.randn(leaf.shape, generator=generator).to(DEVICE)
    return fit


@needs_triton
@pytest.mark.parametrize(
    ("name", "scheme", "options", "linears"),
    [
        ("llama", "w3a16g16-asym", {}, MLP),
        ("llama", "w4a4", {}, MLP),
        ("llama", "w4a16g16-sym", {"qk": "off", "channels": "off"}, [*MLP[1:], *QK]),
        ("llama", "mxfp4", {}, []),
    ],
)
def test_a_learned_step_has_the_same_weights_and_gradients(name, scheme, options, linears):
    fit = fit_of(name, scheme, **options)
    leaves = [leaf for group, _ in fit.groups() for leaf in group]
    plain_params, plain = dict(fit.quantized()[0]), fit.loss(torch.tensor([0, 1]))
    wanted = torch.autograd.grad(plain, leaves, allow_unused=True)
    with weight_kernel.on(DEVICE):
        assert sorted(deferrable(fit.block, fit.sites, fit.start)) == [f"0.{linear}" for linear in linears]
        params, found = dict(fit.quantized()[0]), fit.loss(torch.tensor([0, 1]))
        ours = torch.autograd.grad(found, leaves, allow_unused=True)
    assert params.keys() == plain_params.keys()
    for key, value in params.items():
        assert torch.equal(value, plain_params[key]), key
    assert torch.equal(found, plain)
    for own, expected in zip(ours, wanted, strict=True):
        assert (own is None) == (expected is None)
        if own is not None:
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-9)


@pytest.mark.heavy
@pytest.mark.skipif(not INSTALLED, reason="needs triton (pip install triton)")
def test_kernels_compile_for_a_gpu_without_fused_or_approximate_arithmetic():
    """The interpreter takes programs that the compiler does not, and says nothing of how a GPU divides."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "weight_kernel_compiler.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {"forward_kernel", "backward_kernel"}
    for row in rows:
        assert (row["fused"], row["approximate"]) == (0, 0), row
        assert row["exact"] > 0
