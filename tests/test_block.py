"""Blocks run the library's layers exactly, carry what the plan settled, and come apart and together again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from lowbit.models.block import Block, Note
from lowbit.models.forward import observe, relative_error, run, run_all, run_quantized
from lowbit.models.runtime_ops import Clip, Matrix
from lowbit.quant.activations import IntTokens
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme import ModelFormats, ModuleFormats
from lowbit.quant.scheme_names import parse_scheme, with_overrides
from tiny import NAMES, block_of, params_of, planned, skeleton_of, tiny_ids, tiny_model


@pytest.mark.parametrize("name", NAMES)
def test_walking_the_blocks_equals_the_model_bit_for_bit(name):
    model, ids = tiny_model(name), tiny_ids()
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    skeleton = skeleton_of(model)
    assert all(p.is_meta for layer in skeleton.layers for p in layer.parameters())
    x = skeleton.embed(ids)
    for i in range(len(skeleton.layers)):
        x = run_all(skeleton.block(i, params_of(model, skeleton, i)), x, batch=4)
    assert torch.equal(skeleton.logits(ids, x), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_model_passes_to_its_layers_fits_any_number_of_sequences(name):
    block, x = block_of(tiny_model(name))
    wanted = run(block, x)
    for batch in (1, 3):
        assert torch.allclose(run_all(block, x, batch=batch), wanted, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_window_of_blocks_equals_its_blocks_in_turn(name):
    model = tiny_model(name)
    skeleton = skeleton_of(model)
    x = skeleton.embed(tiny_ids())
    both = run(skeleton.block(1, params_of(model, skeleton, 1, 2), 2), x)
    one = run(skeleton.block(1, params_of(model, skeleton, 1)), x)
    assert torch.equal(both, run(skeleton.block(2, params_of(model, skeleton, 2)), one))


def test_taps_see_inputs_and_nothing_is_left_behind():
    block, x = block_of(tiny_model("llama"))
    seen = []
    run(block, x, taps={"0.mlp.down_proj": seen.append})
    assert seen[0].shape == (4, 24, 96)
    assert all(not m._forward_pre_hooks for layer in block.layers for m in layer.modules())
    assert block.layers[0].self_attn.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", NAMES)
def test_activation_and_kv_formats_change_the_output_a_little(name):
    block, x = block_of(tiny_model(name))
    exact = run(block, x)
    errors = []
    for scheme in ("w8a8", "w8a4", "w8a16kv8", "w8a16kv4"):
        got = run(planned(block, scheme), x, quantized=True)
        assert torch.equal(run(planned(block, scheme), x), exact)
        errors.append(float((got - exact).square().mean() / exact.square().mean()))
    assert 0 < errors[0] < 0.01 < 100 * errors[1]
    assert 0 < errors[2] < errors[3] < 0.2
    assert errors[0] < errors[1]


def test_linears_of_a_group_read_one_tensor():
    for name in NAMES:
        block, x = block_of(tiny_model(name))
        seen: dict[str, torch.Tensor] = {}
        order: list[str] = []

        def keep(key, value, order=order, seen=seen):
            order.append(key)
            seen[key] = value

        run(block, x, taps={key: partial(keep, key) for key in block.linears()})
        assert sorted(order) == sorted(block.linears())
        for group in block.linear_groups():
            assert all(torch.equal(seen[key], seen[group[0]]) for key in group)
        firsts = [order.index(group[0]) for group in block.linear_groups()]
        assert firsts == sorted(firsts)
        weights = {f"{key}.weight" for key in block.linears()}
        others = {k for k, v in block.params.items() if v.ndim == 2} - weights
        assert not others, f"{name}: linears that the family does not list: {others}"


def window() -> tuple[Block, torch.Tensor]:
    """Two layers that have something of everything."""
    block, x = block_of(tiny_model("llama"), 1, 2)
    block = planned(block, with_overrides(parse_scheme("w4a8kv4g16"), {"*.2.self_attn.o_proj": "float"}))
    qweights = {}
    for name in block.quantized_linears():
        format = block.weight_format(name)
        qweights[name] = format.quantize(block.weight(name), format.qparams(block.weight(name)))
    ops = {f"{i}.input_layernorm": Matrix(torch.eye(64)) for i in block.indices}
    ops |= {f"{i}.mlp.down_proj": Clip(torch.tensor([0.9, 0.8])) for i in block.indices}
    clips = {name: (torch.full((1, 1), 0.9), torch.full((1, 1), 0.8)) for name in block.quantized_linears()}
    block = replace(block, qweights=qweights, ops=ops, clips=clips, pictures={"1.a.b": torch.ones(2, 2)})
    return block.with_notes("first", "a note").with_record("first", {"loss": 1.0}), x


def test_a_block_carries_the_formats_that_the_plan_settled():
    block, _ = window()
    assert block.quantized_linears() == [name for name in block.linears() if name != "2.self_attn.o_proj"]
    assert block.weight_format("1.mlp.up_proj") == IntFormat(4, 16, symmetric=False)
    assert block.input_format("1.mlp.up_proj") == IntTokens(8, symmetric=False)
    assert block.input_format("2.self_attn.o_proj") is None
    assert block.kv == IntTokens(4, symmetric=False)
    with pytest.raises(KeyError):
        block.weight_format("2.self_attn.o_proj")
    assert block.full_name("1.mlp.up_proj") == "model.layers.1.mlp.up_proj"
    assert (list(block.indices), block.device) == ([1, 2], torch.device("cpu"))


def test_the_skeleton_gives_a_block_its_own_formats():
    skeleton = skeleton_of(model := tiny_model("llama"))
    weight = ModuleFormats(IntFormat(4))
    formats = ModelFormats({f"model.layers.{i}.mlp.up_proj": weight for i in (0, 1, 11)}, IntTokens(8, True))
    block = skeleton.block(1, params_of(model, skeleton, 1), formats=formats)
    assert (block.formats, block.kv) == ({"1.mlp.up_proj": weight}, IntTokens(8, True))
    assert skeleton.block(1, {}).formats == {}


def test_qparams_are_those_of_the_clipped_ranges():
    block, _ = block_of(tiny_model("llama"))
    block = planned(block, "w3a16-asym")
    name, format = "0.mlp.up_proj", IntFormat(3, symmetric=False)
    wide = block.qparams(name)
    assert torch.equal(wide.scale, format.qparams(block.weight(name)).scale)
    low, high = torch.full((96, 1), 0.5), torch.full((96, 1), 0.25)
    clipped = replace(block, clips={name: (low, high)}).qparams(name)
    assert torch.equal(clipped.scale, format.qparams(block.weight(name), low, high).scale)
    assert bool((clipped.scale < wide.scale).all())


def test_quantized_weights_take_the_place_of_float_ones():
    block, x = window()
    params = block.quantized_params()
    assert params.keys() == block.params.keys()
    name = "1.mlp.up_proj"
    assert torch.equal(params[f"{name}.weight"], block.qweights[name].dequantize())
    assert torch.equal(params["2.self_attn.o_proj.weight"], block.params["2.self_attn.o_proj.weight"])
    assert torch.equal(run_quantized(block, x, batch=3), run_all(block, x, params, quantized=True, batch=3))
    assert relative_error(run_quantized(block, x), run_all(block, x)) > 1e-4


def test_runtime_ops_are_applied_where_they_stand():
    block, x = block_of(tiny_model("llama"))
    block = replace(planned(block, "w8a8"), ops={})
    doubled = replace(block, ops={"0.input_layernorm": Matrix(2 * torch.eye(64))})
    seen: dict[str, list[torch.Tensor]] = {}
    for one in (block, doubled):
        run(one, x, taps={name: seen.setdefault(name, []).append for name in ("0.self_attn.q_proj", "0.mlp.up_proj")})
    before, after = seen["0.self_attn.q_proj"]
    assert torch.equal(after, 2 * before)
    name = "0.mlp.down_proj"
    block = replace(block, formats={name: block.formats[name]})  # so that it reads the same tensor every time
    clipped = replace(block, ops={name: Clip(torch.tensor([0.5, 0.5]))})
    inputs: list[torch.Tensor] = []
    for one, quantized in ((block, False), (clipped, False), (block, True), (clipped, True)):
        run(one, x, taps={name: inputs.append}, quantized=quantized)
    exact, unquantized, plain, got = inputs
    assert torch.equal(unquantized, exact)  # without a format there is no range to clip
    assert torch.equal(plain, block.input_format(name).fake_quant(exact))
    assert torch.equal(got, block.input_format(name).fake_quant(exact, 0.5, 0.5))
    assert not torch.equal(got, plain)
    assert all(not m._forward_hooks for layer in block.layers for m in layer.modules())


def test_observing_ends_where_the_last_tap_has_seen_its_tensor():
    block, x = window()
    seen: list[str] = []
    wanted: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    run_all(block, x, taps={"1.mlp.up_proj": whole.append}, quantized=True, batch=3)
    taps = {"1.mlp.up_proj": wanted.append, "1.self_attn.q_proj": lambda value: seen.append("q")}
    observe(block, x, taps, quantized=True, batch=3)
    assert torch.equal(torch.cat(wanted), torch.cat(whole))
    assert seen == ["q", "q"]
    with pytest.raises(RuntimeError, match="mine"):  # nothing but its own end of a pass is swallowed
        observe(block, x, {"1.mlp.up_proj": lambda value: (_ for _ in ()).throw(RuntimeError("mine"))})


def test_a_part_is_a_block_of_its_own_layers():
    block, x = window()
    part = block.part(1, 2)
    assert (list(part.indices), part.layers, part.kwargs) == ([2], block.layers[1:], block.kwargs[1:])
    for name in ("params", "formats", "clips", "qweights", "ops"):
        ours = getattr(block, name)
        assert dict(getattr(part, name)) == {key: value for key, value in ours.items() if key.startswith("2.")}
    assert part.kv == block.kv
    assert (part.notes, dict(part.record), dict(part.pictures)) == ((), dict(block.record), {})
    both = run(block, x, quantized=True)
    assert torch.equal(run(part, run(block.part(0, 1), x, quantized=True), quantized=True), both)


def test_parts_put_back_give_the_block():
    block, _ = window()
    again = block.with_part(block.part(0, 1)).with_part(block.part(1, 2))
    for name in ("params", "formats", "clips", "qweights", "ops", "pictures", "record"):
        assert dict(getattr(again, name)) == dict(getattr(block, name)), name
    assert (again.notes, again.layers, again.start) == (block.notes, block.layers, block.start)


def test_what_was_done_to_a_part_takes_the_place_of_what_was_there():
    block, _ = window()
    done = replace(
        block.part(1, 2),
        params={**block.part(1, 2).params, "2.mlp.up_proj.weight": torch.zeros(96, 64)},
        clips={},
        qweights={"2.mlp.up_proj": block.qweights["2.mlp.up_proj"]},
        ops={"2.mlp.up_proj": Clip(torch.tensor([0.5, 0.5]))},
        pictures={"2.a.b": torch.zeros(1, 1)},
    )
    done = done.with_notes("second", "another").with_record("second", {"loss": 2.0})
    merged = block.with_part(done).with_part(replace(block.part(0, 1), record={1: {"second": {"loss": 3.0}}}))
    assert torch.equal(merged.params["2.mlp.up_proj.weight"], torch.zeros(96, 64))
    assert merged.params["1.mlp.up_proj.weight"] is block.params["1.mlp.up_proj.weight"]
    # The part has given its clips up; the other layer's stand.
    assert {name for name in merged.clips if name.startswith("2.")} == set()
    assert {name for name in merged.clips if name.startswith("1.")} == set(block.part(0, 1).clips)
    assert [name for name in merged.qweights if name.startswith("2.")] == ["2.mlp.up_proj"]
    assert set(merged.ops) == {"1.input_layernorm", "1.mlp.down_proj", "2.mlp.up_proj"}
    assert merged.notes == (Note(1, "first: a note"), Note(2, "second: another"))
    assert merged.record == {1: {"first": {"loss": 1.0}, "second": {"loss": 3.0}}, 2: {"second": {"loss": 2.0}}}
    assert set(merged.pictures) == {"1.a.b", "2.a.b"}
    assert block.notes == (Note(1, "first: a note"),)  # what was given stays as it is
    assert "2.mlp.down_proj" in block.ops


def test_notes_and_records_belong_to_the_first_layer_and_a_second_step_of_a_name_has_its_own():
    block, _ = block_of(tiny_model("llama"), 1)
    block = block.with_notes("gptq", "one", "two").with_record("gptq", {"a": 1}).with_record("gptq", {"b": 2})
    assert block.notes == (Note(1, "gptq: one"), Note(1, "gptq: two"))
    assert block.record == {1: {"gptq": {"a": 1}, "gptq-2": {"b": 2}}}
    assert (block.record_key("gptq"), block.record_key("awq")) == ("gptq-3", "awq")
