"""Streams and their rows where nothing is on a GPU: plain splits and indices; and what a fit announces.

What a GPU adds is tested in ``test_cuda.py``.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from held import Held
from lowbit.errors import LowbitError
from lowbit.methods.reassemble import Reassemble
from lowbit.methods.training import Schedule, fit
from lowbit.models.block import Calib, run_all
from lowbit.models.offload import Rows, home, joined, parts
from lowbit.quant import inductor as module
from lowbit.quant.affine import QuantSpec, fake_quant, minmax_grid, weight_ends
from lowbit.quant.inductor import check_compiler, compiled, on, options, rounded_weight
from lowbit.quant.scheme import parse_scheme
from tiny import block_of, tiny_model

CPU = torch.device("cpu")


def test_streams_live_on_the_host_for_a_gpu_only():
    assert home("cuda") == home("cuda:1") == home("cpu") == CPU
    assert home("mps") == torch.device("mps")


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_parts_are_views_and_join_to_the_whole(batch):
    x = torch.randn(7, 2, 3)
    found = list(parts(x, batch, CPU))
    assert [len(part) for part in found] == [len(part) for part in x.split(batch)]
    assert all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in found)
    assert torch.equal(joined(found, 7, CPU), x)


def test_rows_are_the_chosen_ones_prepared_or_not():
    x, y = torch.randn(7, 2, 3), torch.randn(7, 1)
    rows = Rows(CPU, x, y)
    for prepared in ([], [4, 1], [0]):
        rows.prepare(torch.tensor(prepared, dtype=torch.int64))
        got = rows(torch.tensor([4, 1]))
        assert torch.equal(got[0], x[[4, 1]])
        assert torch.equal(got[1], y[[4, 1]])


def test_a_block_is_where_its_parameters_are():
    block, x = block_of(tiny_model("llama"))
    assert block.device == CPU
    assert run_all(block, x, batch=3).device == CPU
    meta = {name: value.to("meta") for name, value in block.params.items()}
    assert type(block)(block.layers, 0, block.kwargs, block.family, block.heads, meta).device.type == "meta"


@pytest.mark.parametrize("held_out", [0.0, 0.6])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_fit_announces_every_loss_but_the_first(held_out, batch):
    """In training, over the border of an epoch, and in the passes over held-out sequences, which take several."""
    x = torch.tensor([3.0], requires_grad=True)
    told, asked = [], []

    def loss(chosen):
        assert len(told) in (len(asked), len(asked) + 1)  # the next, and no more, before this one
        asked.append(chosen.tolist())
        return (x - chosen.float().mean()).square().sum()

    schedule = Schedule(3, batch, held_out, seed=4)
    fit([([x], 0.1)], loss, 11, schedule, ahead=lambda chosen: told.append(chosen.tolist()))
    train, held = schedule.split(11)
    looks = -(-len(held) // max(batch, 4))
    assert len(asked) == 3 * -(-len(train) // batch) + 4 * looks
    assert told == asked[1:]


def test_a_fit_that_goes_on_announces_what_it_asks_for(tmp_path):
    told, asked = [], []

    def attempt(stop):
        x = torch.tensor([3.0], requires_grad=True)
        told.clear()
        asked.clear()

        def loss(chosen):
            if len(asked) == stop:
                raise KeyboardInterrupt
            asked.append(chosen.tolist())
            return (x - chosen.float().mean()).square().sum()

        ahead = lambda chosen: told.append(chosen.tolist())  # noqa: E731
        return fit([([x], 0.1)], loss, 8, Schedule(3, 2), keep=tmp_path / "state.safetensors", ahead=ahead)

    with pytest.raises(KeyboardInterrupt):
        attempt(8)
    assert attempt(None).train
    assert len(asked) == 2 * 5  # the second and third epochs: four steps and a look each
    assert told == asked[1:]


@pytest.mark.parametrize("spec", [QuantSpec(3, 16, False), QuantSpec(4)], ids=["asym-groups", "sym"])
def test_what_is_compiled_traces_whole_and_is_plain_without_a_gpu(spec, monkeypatch):
    """The graph is run operation by operation: kernels need a GPU, the trace does not."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **k: real(f, backend="aot_eager", **k))
    weight = torch.randn(8, 32, requires_grad=True)
    compiled.cache_clear()
    with on():
        plain = rounded_weight(weight, spec)
        assert compiled.cache_info().currsize == 0  # on a CPU nothing is compiled
        monkeypatch.setattr("lowbit.quant.inductor._compiles", lambda x: True)
        fused = rounded_weight(weight, spec)
    assert compiled.cache_info().currsize == 2
    compiled.cache_clear()
    assert torch.equal(fused, plain)
    assert torch.equal(fused, fake_quant(weight, minmax_grid(weight, spec), spec))
    gradients = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (fused, plain)]
    torch.testing.assert_close(*gradients)
    assert weight_ends(weight, spec)[0].max() <= 0


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


def test_a_stream_through_a_block_is_held_once():
    block, x = block_of(tiny_model("llama"), 1)
    x = x.repeat(64, 1, 1)
    with Held(x.numel() // 8) as held:  # what one part makes is smaller than that
        run_all(block, x, batch=1)
    assert held.numbers == x.numel()


def test_a_step_through_a_window_holds_the_streams_that_are_estimated():
    block, x = block_of(tiny_model("llama"), 0, 3)
    x = x.repeat(64, 1, 1)
    calib = Calib(x, x, run_all(block, x), batch=1)  # three streams, of which two are one here
    with Held(x.numel() // 8) as held:
        Reassemble(sequences=1)(block, calib, parse_scheme("w4a4"))
    assert held.numbers == 4 * x.numel()
