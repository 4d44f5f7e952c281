"""Streams and their rows where nothing is on a GPU: plain splits and indices; and what a fit announces.

What a GPU adds is tested in ``test_cuda.py``.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from held import Held
from lowbit.methods.reassemble import Reassemble
from lowbit.methods.training import Schedule, fit
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.models.offload import Rows, batches, concatenate, storage_device
from tiny import block_of, planned, tiny_model

CPU = torch.device("cpu")


def test_streams_live_on_the_host_for_a_gpu_only():
    assert storage_device("cuda") == storage_device("cuda:1") == storage_device("cpu") == CPU
    assert storage_device("mps") == torch.device("mps")


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_parts_are_views_and_join_to_the_whole(batch):
    x = torch.randn(7, 2, 3)
    found = list(batches(x, batch, CPU))
    assert [len(part) for part in found] == [len(part) for part in x.split(batch)]
    assert all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in found)
    assert torch.equal(concatenate(found, 7, CPU), x)


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
    assert replace(block, params=meta).device.type == "meta"


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

    schedule = Schedule(3, batch, held_out)
    fit([([x], 0.1)], loss, 11, schedule, seed=4, ahead=lambda chosen: told.append(chosen.tolist()))
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


def test_a_stream_through_a_block_is_held_once():
    block, x = block_of(tiny_model("llama"), 1)
    x = x.repeat(64, 1, 1)
    with Held(x.numel() // 8) as held:  # what one part makes is smaller than that
        run_all(block, x, batch=1)
    assert held.numbers == x.numel()


def test_a_step_through_a_window_holds_the_streams_that_are_estimated():
    block, x = block_of(tiny_model("llama"), 0, 3)
    x = x.repeat(16, 1, 1)
    calib = Calib(x, x, run_all(block, x), batch=1)  # three streams, of which two are one here
    with Held(x.numel() // 8) as held:
        Reassemble(sequences=1)(planned(block, "w4a4"), calib)
    assert held.numbers == 4 * x.numel()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own ways")
def test_free_memory_below_a_block_in_use_goes_back_to_the_system():
    """In a process of its own: kept blocks lie above freed ones, which is where glibc keeps the latter."""
    code = """
import psutil, torch
from lowbit.models.offload import release_free_memory
pairs = [(torch.zeros(25_000), torch.zeros(25)) for _ in range(1000)]
kept = [small for _, small in pairs]
del pairs
before = psutil.Process().memory_info().rss
release_free_memory()
print(before - psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50e6, "of 100 MB"
