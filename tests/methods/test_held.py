"""What reassembly and correction hold: two channels x channels matrices, and a window, not a model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from held import Held
from lowbit.methods.lowrank import Correction, LowRank
from lowbit.methods.reassemble import Reassemble
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from tiny import block_of, planned, tiny_model

WIDE = 256


def wide_case(kind):
    """A layer with many channels behind one kind of edge, two of them outliers; all else is small."""
    sizes = {"hidden_size": WIDE, "intermediate_size": 24}
    if kind == "down":
        sizes = {"hidden_size": 24, "intermediate_size": WIDE}
    model = tiny_model("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=8, **sizes)
    block, x = block_of(model, 1)
    block = planned(block, "w4a4")
    edge = next(e for e in block.edges() if e.kind == ("norm" if kind == "norms" else "channels"))
    source = block.params[edge.src.parameter].clone()
    source[[5, 9]] *= 40.0
    block = replace(block, params={**block.params, edge.src.parameter: source})
    x = x[:2]
    return block, Calib(x, x, run_all(block, x))


@pytest.mark.parametrize(
    ("kind", "assembly", "tokens"),
    [
        ("down", "drop", "normalized"),
        ("norms", "drop", "unweighted"),
        ("norms", "bipartite", "normalized"),
        ("norms", "one-to-one", "unweighted"),
    ],
)
def test_matching_and_search_hold_two_matrices_of_the_channels_squared(kind, assembly, tokens):
    block, calib = wide_case(kind)
    step = Reassemble(sites=kind, assembly=assembly, tokens=tokens, most=0.1)
    with Held(WIDE**2 // 5) as held:  # weights and activations are smaller than that, halves of the channels larger
        done = step(block, calib)
    searched = done.record[1]["reassemble"].values()
    assert any(len(figures["scores"]) > 3 for figures in searched)  # candidates were made while it was counted
    assert WIDE**2 < held.numbers <= 2 * WIDE**2


@cache
def one_step(count, layers):
    """What a step of the correction holds for the last ``count`` of a model's layers."""
    block, x = block_of(tiny_model("llama", num_hidden_layers=layers), layers - count, count)
    correction = Correction(LowRank(rank=4), planned(block, "w4a4"), Calib(x, x, run_all(block, x)))
    with Held() as held:
        correction.loss(torch.tensor([0])).backward()
    return held.numbers


def test_a_correction_holds_its_window_whatever_the_model():
    assert one_step(2, 3) == one_step(2, 6)
    one, two, four = (one_step(count, 6) for count in (1, 2, 4))
    assert one < two < four
    # In proportion, beside what does not depend on the window.
    assert four - two == pytest.approx(2 * (two - one), rel=0.1)
