"""Fused fake quantization where nothing is on a GPU: what is compiled, and what is refused.

What a GPU adds is tested in ``test_cuda.py``.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.quant import inductor as module
from lowbit.quant.activations import IntTokens
from lowbit.quant.inductor import check_compiler, compiled, on, options
from lowbit.quant.integer import IntFormat


@pytest.fixture
def traced(monkeypatch):
    """Everything is compiled, also on a CPU, and the graph is run operation by operation: kernels need a GPU."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **k: real(f, backend="aot_eager", **k))
    compiled.cache_clear()
    yield lambda: monkeypatch.setattr(module, "active", lambda x: module._using[0])
    compiled.cache_clear()


@pytest.mark.parametrize("format", [IntFormat(3, 16, False), IntFormat(4)], ids=lambda format: format.name)
def test_what_is_compiled_traces_whole_and_is_plain_without_a_gpu(format, traced):
    weight = torch.randn(8, 32, requires_grad=True)
    with on():
        plain = format.fake_quant_clipped(weight, 0.9, 0.8)
        assert compiled.cache_info().currsize == 0  # on a CPU nothing is compiled
        traced()
        fused = format.fake_quant_clipped(weight, 0.9, 0.8)
    assert compiled.cache_info().currsize == 2
    assert torch.equal(fused, plain)
    assert torch.equal(fused, format.fake_quant(weight, format.qparams(weight, 0.9, 0.8)))
    gradients = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (fused, plain)]
    torch.testing.assert_close(*gradients)


def test_what_is_compiled_of_activations_traces_whole(traced):
    format, x = IntTokens(4, symmetric=False), torch.randn(2, 3, 32, requires_grad=True)
    more = torch.tensor(0.9), torch.tensor(0.8), torch.rand(32) - 0.5
    plain = format.fake_quant(x, *more)
    traced()
    assert torch.equal(format.fake_quant(x, *more), plain)
    assert compiled.cache_info().currsize == 0  # nothing is, but within on()
    with on():
        fused = format.fake_quant(x, *more)
    assert compiled.cache_info().currsize == 2
    assert torch.equal(fused, plain)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (fused, plain)]
    torch.testing.assert_close(*gradients)


def test_a_torch_that_cannot_keep_the_numbers_is_refused(monkeypatch):
    known = torch._inductor.list_options()
    assert all(options().values())
    monkeypatch.setattr(torch._inductor, "list_options", lambda: [n for n in known if "precision_casts" not in n])
    with pytest.raises(LowbitError, match="emulate_precision_casts"), on():
        pass


def test_what_compiling_needs_is_asked_for_before_any_work(monkeypatch):
    with pytest.raises(LowbitError, match="--device mps"):
        check_compiler("mps")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LowbitError, match="pip install triton"):
        check_compiler("cuda:0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "SETTINGS", (("no.such_setting",),))
    with pytest.raises(LowbitError, match="cannot keep eager numerics"):
        check_compiler("cuda:0")
