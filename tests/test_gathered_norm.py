"""Norm and gather as one module, and as one kernel, against the two after each other."""

from __future__ import annotations

import pytest
import torch

import lowbit
from interpreted import DEVICE, needs_triton
from lowbit.errors import LowbitError
from lowbit.methods import RTN
from lowbit.methods.reassemble import Reassemble
from lowbit.models.families import architecture_of
from lowbit.models.gathered_norm import GatheredRMSNorm, gathered_norm
from lowbit.models.runtime_ops import Clip, Gather, Matrix
from lowbit.pipeline.recipe import Recipe
from lowbit.quant.activations import IntTokens
from runs import quantize_tiny, streamed_logits
from tiny import save_tiny, tiny_ids, tiny_model


def gather(width: int, merging: bool) -> Gather:
    """Channel 5 three times in place of 0 and 2, which are dropped or, merging, added to 7."""
    idx = torch.arange(width)
    idx[[0, 2]] = 5
    factor = torch.ones(width)
    factor[[0, 2, 5]] = 1 / 3
    if not merging:
        return Gather(idx, factor)
    into = torch.full((width,), -1)
    into[[0, 2]] = 7
    factor[7] = 1 / 3
    return Gather(idx, factor, into)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "phi3"])
def test_the_module_is_the_norm_and_the_gather_bit_for_bit(name, merging, dtype):
    model = tiny_model(name).to(dtype)
    norm, op = model.model.layers[1].input_layernorm, gather(64, merging)
    one = gathered_norm(norm, architecture_of(model.config).layers[0].edges[0].offset, op)
    x = (3 * torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.no_grad():
        wanted = op(norm(x))
        assert torch.equal(one(x), wanted)
        small = x.clone()
        small[..., 20] *= 100  # a channel that is not gathered twice moves rstd all the same
        assert not torch.equal(one(small)[..., 5], wanted[..., 5])


def test_what_cannot_be_one_keeps_the_hook():
    norm = tiny_model("llama").model.layers[0].input_layernorm
    assert gathered_norm(torch.nn.LayerNorm(64), 0.0, gather(64, merging=False)) is None
    assert gathered_norm(norm, 0.0, Matrix(torch.eye(64))) is None
    assert gathered_norm(norm, 0.0, Clip(torch.ones(2))) is None


@pytest.mark.parametrize(("name", "fused"), [("llama-odd", True), ("gemma3", True), ("opt", False)])
def test_load_restores_it(name, fused, tmp_path):
    save_tiny(tmp_path / "m", name)
    steps = (("reassemble", Reassemble(sites="all", most=0.3)), ("rtn", RTN()))
    made = quantize_tiny(tmp_path / "m", tmp_path / "out", "w4a4", Recipe("r", steps))
    assert set(made.manifest.runtime_ops.values()) == {"gather"}
    loaded = lowbit.load(tmp_path / "out")
    found = [module for module in loaded.modules() if isinstance(module, GatheredRMSNorm)]
    assert len(found) == (len(made.manifest.runtime_ops) if fused else 0)
    ids = tiny_ids()
    simulated = streamed_logits(tmp_path / "out", ids)
    got = loaded(ids, use_cache=False).logits.detach()
    assert float((got - simulated).abs().max() / simulated.abs().max()) < 1e-5


@needs_triton
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("width", [64, 96])
def test_the_kernel_gives_the_plain_forms_numbers(width, bits):
    from lowbit.models.gathered_norm_triton import norm_gather_quantize

    device = DEVICE
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(1 + 0.3 * torch.randn(width, generator=generator))
    norm = GatheredRMSNorm(weight, 1e-5, 0.0, gather(width, merging=False)).to(device)
    x = torch.randn(17, width, generator=generator)
    x[:, 5] *= 20
    x[3] = 0
    x = x.to(device)
    with torch.no_grad():
        codes, scales, zeros = norm_gather_quantize(norm, x, bits)
        plain = norm(x)
        wanted = IntTokens(bits, symmetric=False).fake_quant(plain)
    found = (codes.float() - zeros[:, None]) * scales[:, None]
    # A sum in another order moves rstd by an ulp, which may move a value at the edge between two codes by one step.
    off = (found - wanted).abs() / scales[:, None]
    assert float(off.max()) < 1.01
    assert float((off > 1e-3).float().mean()) < 2e-3
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert torch.equal(found[3], torch.zeros_like(found[3]))


@needs_triton
def test_the_kernel_refuses_what_it_does_not_compute():
    from lowbit.models.gathered_norm_triton import norm_gather_quantize

    weight = torch.nn.Parameter(torch.ones(64))
    with pytest.raises(LowbitError, match="with merged channels"):
        norm_gather_quantize(GatheredRMSNorm(weight, 1e-5, 0.0, gather(64, merging=True)), torch.ones(2, 64), 4)
    norm = GatheredRMSNorm(weight, 1e-5, 0.0, gather(64, merging=False))
    for shape in ((2, 63), (1, 2, 64)):
        with pytest.raises(LowbitError, match=r"\(tokens, width\)"):
            norm_gather_quantize(norm, torch.ones(shape), 4)
