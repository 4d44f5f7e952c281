"""Statistics of an expert are from the tokens routed to it; one that too few reach goes without."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lowbit.methods import inputs
from lowbit.methods.awq import AWQ
from lowbit.methods.gptq import GPTQ, inverse_factor
from lowbit.methods.gptq_columns import gptq_codes
from lowbit.methods.inputs import held_together, input_groups, stages
from lowbit.methods.refit import Refit
from lowbit.methods.rtn import RTN
from lowbit.methods.statistics import input_statistics, paired_statistics
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.quant.scale_search import search_scales
from mixtures import tiny_mixture, with_a_cold_expert
from tiny import block_of, planned

LAYER, COLD = 2, 4


@cache
def case(scheme="w4a16g16-asym", cold=False):
    """A layer of a mixture, its calibration data with noise in the quantized model's, and the library's layer."""
    model = with_a_cold_expert("qwen3-moe") if cold else tiny_mixture("qwen3-moe")
    block, x = block_of(model, start=LAYER)
    block = replace(planned(block, scheme), least_tokens=4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    return block, Calib(x, x + 0.05 * x.std() * noise, run_all(block, x)), model.model.layers[LAYER]


def names(expert):
    return [f"{LAYER}.mlp.experts.{expert}.{name}_proj" for name in ("gate", "up", "down")]


def routed(layer, block, x):
    """For each expert the hidden states that a literal loop over tokens sends to it, by the library's router."""
    seen = []
    hook = layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        layer(x, **block.kwargs[0])
    hook.remove()
    (hidden,) = seen
    _, _, chosen = layer.mlp.gate(hidden)
    out = {number: [] for number in range(layer.mlp.experts.num_experts)}
    for token, experts in zip(hidden, chosen.tolist(), strict=True):
        for number in experts:
            out[number].append(token)
    return out


def test_an_experts_moments_are_those_of_a_loop_over_the_tokens_routed_to_it():
    block, calib, layer = case()
    reached = routed(layer, block, calib.x_fp)
    seen = input_statistics(block, calib.x_fp, block.linears(), ("gram", "magnitude"), batch=3)
    assert 0 < min(map(len, reached.values())) < max(map(len, reached.values()))
    for number, tokens in reached.items():
        gate, up, down = names(number)
        gram, inner = torch.zeros(64, 64, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
        for token in tokens:
            gram += token.double().outer(token.double())
            product = torch.nn.functional.silu(block.weight(gate) @ token) * (block.weight(up) @ token)
            inner += product.double().outer(product.double())
        assert seen[gate].count == seen[down].count == len(tokens)
        for name, wanted in ((gate, gram), (up, gram), (down, inner)):
            assert torch.allclose(seen[name]["gram"].double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))


def test_gptq_rounds_each_expert_with_its_own_moments():
    block, calib, _ = case()
    got = GPTQ(tokens="unweighted", act_order=False, shrinkage=1.0)(block, calib).qweights
    # The attention's linears are quantized before, in another stage: theirs are the hidden states that experts read.
    attention = {name: q for name, q in got.items() if "self_attn" in name}
    start = replace(block, qweights=attention)
    reads = [name for number in range(4) for name in names(number)[:2]]
    params = start.quantized_params()
    seen = input_statistics(start, calib.x_q, reads, ("gram",), params, quantized=True)
    for name in reads:
        # An expert that few tokens reach gets more damping.
        upper, _ = inverse_factor(seen[name]["gram"], 0.01 + 64 / seen[name].count)
        weight, format = block.weight(name), block.weight_format(name)
        codes = gptq_codes(weight, upper, torch.arange(64), format.qparams(weight), format, 128)
        assert torch.equal(got[name].codes, codes)
    assert not torch.equal(seen[reads[0]]["gram"], seen[reads[2]]["gram"])


def test_moments_that_are_held_one_at_a_time_give_the_same_codes(monkeypatch):
    block, calib, _ = case()
    together, wanted = list(stages(block)), GPTQ()(block, calib).qweights
    assert [len(groups) for groups in together] == [1, 1, 4, 4]
    assert [group for groups in together for group in groups] == input_groups(block)
    monkeypatch.setattr(inputs, "HELD", 1)
    assert [len(groups) for groups in stages(block)] == [1] * 10
    assert list(held_together(block, [], 1)) == []
    got = GPTQ()(block, calib).qweights
    assert all(torch.equal(got[name].codes, q.codes) for name, q in wanted.items())


def test_paired_inputs_are_those_of_the_same_tokens():
    block, calib, layer = case()
    gate, _, down = names(3)
    seen = paired_statistics(block, block, calib, [gate, down], ("gram", "cross"))
    own = routed(layer, block, calib.x_q)[3]
    assert seen[gate].count == seen[down].count == len(own)
    gram = sum(token.outer(token) for token in own)
    assert torch.allclose(seen[gate]["gram"], gram, rtol=1e-4, atol=1e-3)
    # One stream for both: the inputs are the same, and so are the moments.
    same = paired_statistics(block, block, Calib(calib.x_q, calib.x_q, calib.y_fp), [gate, down], ("gram", "cross"))
    for name in (gate, down):
        assert torch.allclose(same[name]["gram"], same[name]["cross"], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(seen[name]["gram"], seen[name]["cross"], rtol=1e-2, atol=1e-2)


STEPS = {
    "gptq": GPTQ(),
    "gptq, output": GPTQ(target="output"),
    "rtn, search": RTN(search=True),
    "awq": AWQ(),
    "refit": Refit(),
}


@pytest.mark.parametrize("step", STEPS)
def test_an_expert_that_no_token_reaches_goes_without_calibration_data_and_is_named(step):
    block, calib, _ = case(cold=True)
    got = STEPS[step](block, calib)
    (note,) = [note.text for note in got.notes if "calibration tokens reach" in note.text]
    assert f": {COLD} (0)" in note
    gate, _, down = names(COLD)
    assert torch.equal(got.weight(gate), block.weight(gate)) or step == "awq"  # the norm's scale is for all
    assert torch.equal(got.weight(down), block.weight(down))
    if step.startswith(("gptq", "rtn")):
        assert got.qweights.keys() == block.formats.keys()
        for name in names(COLD):
            weight, format = block.weight(name), block.weight_format(name)
            qparams = search_scales(weight, format, block.qparams(name))
            assert torch.equal(got.qweights[name].codes, format.quantize(weight, qparams).codes)
    if step == "awq":
        assert got.clips.keys() >= set(names(COLD))
    warm = names(0)[2]
    assert not torch.equal(got.weight(warm), block.weight(warm)) or step.startswith(("gptq", "rtn"))


def test_the_limit_decides_who_is_cold_and_all_tokens_leave_no_one_cold():
    block, calib, layer = case()
    counts = {number: len(tokens) for number, tokens in routed(layer, block, calib.x_q).items()}
    limit = sorted(counts.values())[1]
    limited = RTN(search=True)(replace(block, least_tokens=limit), calib)
    (note,) = [note.text for note in limited.notes]
    cold = [number for number, count in counts.items() if count < limit]
    assert note.endswith(": " + ", ".join(f"{number} ({counts[number]})" for number in cold))
    everyone = replace(block, least_tokens=limit, every_token=True)
    assert RTN(search=True)(everyone, calib).notes == ()
    seen = input_statistics(everyone, calib.x_q, [names(0)[0]], ("gram",))
    assert seen[names(0)[0]].count == calib.x_q[..., 0].numel()
    block, calib, _ = case(cold=True)
    got = GPTQ()(replace(block, every_token=True), calib)
    assert got.notes == ()
    assert got.qweights.keys() == block.formats.keys()


def test_a_limit_of_no_token_still_leaves_what_none_reaches_without_data():
    block, calib, _ = case(cold=True)
    assert f"{COLD} (0)" in GPTQ()(replace(block, least_tokens=0), calib).notes[0].text
