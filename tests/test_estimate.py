"""What ``inspect`` predicts of a run: operations against torch's own count, memory, ranks, mixtures, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from counted import Counted
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.awq import AWQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.options import with_options
from lowbit.methods.rtn import RTN
from lowbit.methods.training import Schedule
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.estimate import Calibration, Model, estimate
from lowbit.pipeline.inspect import inspect_model
from lowbit.pipeline.layer_shapes import layer_shapes
from lowbit.pipeline.machine import Machine, Rates, rate_in
from lowbit.pipeline.operations import Tokens, Work, forward
from lowbit.pipeline.recipe import load_recipe, with_effort
from lowbit.pipeline.smallest_change import Choice, misfits, smallest_change
from lowbit.pipeline.step_operations import fit_step, step_work
from lowbit.quant.scheme_files import load_scheme
from lowbit.runs.plan import make_plan
from tiny import tiny_ids, tiny_model

RATES = Rates(1e10, 1e9, 1e10, 1e-6)
DATA = Tokens(8, 32)
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def command(capsys):
    """Runs the command in this process: ``(exit code, stdout, stderr)``."""

    def run_command(*given):
        capsys.readouterr()
        code = call([str(part) for part in given])
        return code, *capsys.readouterr()

    return run_command


def made(name, scheme, **sizes):
    """A tiny model's skeleton with parameters, its first block with formats, that block's inputs, its shape."""
    changes = sizes or {}
    model = tiny_model(name, **changes)
    skeleton = Skeleton(model.config)
    skeleton.fill({n: p for n, p in model.state_dict().items() if n in skeleton.shared_names})
    plan = make_plan(skeleton, load_scheme(scheme))
    x = skeleton.embed(tiny_ids(DATA.samples, DATA.length))
    own = {f"0.{n}": model.model.layers[0].get_parameter(n) for n in skeleton.parameter_shapes(0)}
    block = skeleton.block(0, {n: p.detach() for n, p in own.items()}, 1, plan.formats)
    return block, Calib(x, x, run_all(block, x)), next(iter(layer_shapes(skeleton, plan)))


@pytest.fixture(scope="module")
def grouped():
    return made("llama", "w4a16g32-sym", **SIZES)


@pytest.fixture(scope="module")
def quantized_inputs():
    return made("llama", "w4a8", **SIZES)


def counted(work):
    with Counted() as found:
        work()
    return found


def model_of(name, scheme="w4a16g16-sym", **changes):
    config = tiny_model(name).config
    for key, value in changes.items():
        setattr(config, key, value)
    skeleton = Skeleton(config)
    return Model.of(skeleton, make_plan(skeleton, load_scheme(scheme)))


def test_products_of_a_pass_are_torchs_own_count_but_for_attention(grouped):
    block, calib, shape = grouped
    found = counted(lambda: run_all(block, calib.x_q))
    attention = (
        4.0 * DATA.count * DATA.length * shape.attention
    )  # a fused kernel, which torch does not count on a CPU
    assert forward(shape, DATA.count, DATA, False).products - attention == found.products


@pytest.mark.parametrize("scheme", ["grouped", "quantized_inputs"])
def test_bytes_of_a_pass_are_those_that_are_counted(scheme, request):
    block, calib, shape = request.getfixturevalue(scheme)
    found = counted(lambda: run_all(block, calib.x_q, quantized=True))
    assert forward(shape, DATA.count, DATA, True).passes == pytest.approx(found.bytes, rel=0.35)


def test_gptqs_products_and_factorisations_are_counted(grouped):
    block, calib, shape = grouped
    found, work = counted(lambda: GPTQ()(block, calib)), step_work(GPTQ(), shape, DATA)
    assert work.factors == pytest.approx(found.factors, rel=1e-6)
    # Attention, and of updates of columns those within a block of 128, which are no products.
    assert found.products <= work.products <= 1.35 * found.products
    assert work.passes == pytest.approx(found.bytes, rel=0.5)
    assert work.calls == pytest.approx(found.calls, rel=0.35)


def test_awqs_products_are_counted(grouped):
    block, calib, shape = grouped
    found, work = counted(lambda: AWQ()(block, calib)), step_work(AWQ(), shape, DATA)
    assert work.products == pytest.approx(found.products, rel=0.3)
    assert work.passes == pytest.approx(found.bytes, rel=0.4)


def test_roundings_bytes_are_counted(grouped):
    block, calib, shape = grouped
    found = counted(lambda: RTN()(block, calib))
    assert step_work(RTN(), shape, DATA).passes == pytest.approx(found.bytes, rel=0.25)


@pytest.mark.parametrize("scheme", ["grouped", "quantized_inputs"])
def test_a_learned_step_is_counted(scheme, request):
    block, calib, shape = request.getfixturevalue(scheme)
    step = with_options(AffineQuant(), signs=False)
    fit = AffineFit(step.sites, step.maps, step.clipping, step.objective, step.schedule, block, calib)
    fit.begin(step.schedule.epochs)
    found = counted(lambda: fit.loss(torch.tensor([0, 1])).backward())
    work = fit_step(shape, 2, DATA)
    assert work.products == pytest.approx(found.products, rel=0.3)
    assert work.passes == pytest.approx(found.bytes, rel=0.4)


def test_more_ranks_never_take_longer_and_never_more_memory():
    model, recipe = model_of("llama"), with_effort(load_recipe("affinequant+gptq"), "normal")
    calibration = Calibration(64, 64)
    found = [estimate(model, recipe, calibration, Machine(RATES, ranks=n)) for n in (1, 2, 3, 4, 8, 16)]
    fast = replace(RATES, network=1e30)
    free = [estimate(model, recipe, calibration, Machine(fast, ranks=n)).total_seconds for n in (1, 2, 3, 4, 8, 16)]
    assert free == sorted(free, reverse=True)
    assert free[1] < free[0]
    held = [one.needs.of("host") for one in found]
    assert held == sorted(held, reverse=True)
    states = [next(item.size for item in one.needs.items if item.what == "hidden states") for one in found]
    assert states[1] == states[0] / 2


def test_ranks_divide_gptqs_rows_or_experts_but_no_factor_of_a_dense_linear():
    recipe, data = load_recipe("gptq"), Calibration(16, 64)
    dense = model_of("llama", hidden_size=256, intermediate_size=1024)
    mixture = model_of("qwen3-moe", num_experts=16)

    def work(model: Model, ranks: int) -> Work:
        shape = next(shape for shape in model.shapes if shape.expert_weights or model is dense)
        return step_work(recipe.steps[0][1], shape, Tokens(data.samples, data.length, ranks=ranks))

    assert work(dense, 2).factors == work(dense, 1).factors
    assert work(dense, 2).products < 0.6 * work(dense, 1).products
    assert work(mixture, 4).factors < 0.5 * work(mixture, 1).factors


def test_a_learned_step_is_shared_only_in_micro_batches():
    model, recipe = model_of("llama"), load_recipe("affinequant")
    data = Calibration(16, 64)

    def seconds(schedule: Schedule, ranks: int) -> float:
        own = replace(recipe, steps=(("affinequant", replace(AffineQuant(), schedule=schedule)), *recipe.steps[1:]))
        return estimate(model, own, data, Machine(RATES, ranks=ranks)).seconds["affinequant"]

    alone, shared = Schedule(4, batch=4), Schedule(4, batch=4, micro_batch=1)
    assert seconds(shared, 4) < 0.35 * seconds(shared, 1)
    assert seconds(alone, 4) > 0.8 * seconds(alone, 1)


def test_a_mixture_computes_a_share_of_its_experts_and_holds_all_of_them():
    few, many = model_of("qwen3-moe"), model_of("qwen3-moe", num_experts=16)
    assert [sum(m.shapes.values()) for m in (few, many)] == [3, 3]
    own = [next(shape for shape in m.shapes if shape.expert_weights) for m in (few, many)]
    assert own[1].expert_weights == 4 * own[0].expert_weights
    assert sum(r.active for r in own[0].reads if r.expert) == sum(r.active for r in own[1].reads if r.expert)
    assert next(r.share for r in own[1].reads if r.expert) == 2 / 16
    recipe, data = load_recipe("gptq"), Calibration(8, 64)
    needs = [estimate(m, recipe, data, Machine(RATES)).needs.of("host") for m in (few, many)]
    assert needs[1] > needs[0]


def test_gptqs_float64_factorisation_is_what_a_wide_layer_takes_most_memory_for():
    """28,672 channels, as those of a 70B: 52 bytes for each second moment are 43 GB."""
    wide = model_of("llama", hidden_size=8192, intermediate_size=28672, num_attention_heads=64, head_dim=128)
    machine = Machine(RATES, 10**12, 40 * 10**9, value_bytes=2)
    choice = Choice(load_recipe("gptq"), Calibration(32, 512), machine)
    needs = choice.needs(wide)
    (miss,) = misfits(needs, machine)
    assert (miss.place, miss.largest) == ("device", "gptq")
    assert next(item.size for item in needs.items if item.what == "gptq") > 43e9
    assert smallest_change(wide, choice) == "--recipe rtn"


def test_the_smallest_change_is_fewer_windows_then_another_recipe_and_else_what_it_takes():
    model, recipe = model_of("llama", hidden_size=1024, num_attention_heads=8, head_dim=128), load_recipe("gptq")
    stream = 4 * 64 * 512 * 1024 * 4

    def advice(memory: int, samples: int = 64) -> str:
        return smallest_change(model, Choice(recipe, Calibration(samples, 512), Machine(RATES, memory)))

    whole = Choice(recipe, Calibration(64, 512), Machine(RATES)).needs(model).of("host")
    assert advice(whole - 1) == "--samples 32"
    assert advice(whole - stream // 2 - 1) == "--samples 16"
    assert advice(10**6).startswith("no change of options fits: 'rtn' with 8 windows takes 0.")
    assert not misfits(
        Choice(recipe, Calibration(64, 512), Machine(RATES, whole)).needs(model), Machine(RATES, whole)
    )


def test_a_config_alone_suffices(tmp_path, command):
    config = tiny_model("qwen3-moe").config
    config.save_pretrained(tmp_path)
    arguments = ("inspect", tmp_path, "--config-only", "--scheme", "w4a16g16-sym", "--length", "64", "--ranks", "4")
    stated = ("--device-memory", "2GB", "--host-memory", "1GB", "--flops", "100T", "--bandwidth", "1T")
    code, out, err = command(*arguments, *stated, "--dtype", "bfloat16", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["ranks"], found["fits"], found["blocks"]) == (4, "yes", 3)
    assert found["estimated_device_bytes"] == sum(n for k, n in found["memory_of"].items() if k.startswith("device"))
    assert found["estimated_seconds"] == pytest.approx(sum(found["seconds_of"].values()), abs=0.2)
    small = command(*arguments, "--device-memory", "500MB", "--json")[1]
    assert "does not fit: " in json.loads(small)["fits"]
    assert json.loads(small)["estimated_time"] == "not estimated: give --flops and --bandwidth of the device"
    printed = command(*arguments, *stated)[1]
    assert "device: embeddings and head" in printed


def test_the_weights_say_the_same_as_the_config(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    given = {"samples": 8, "length": 32, "machine": Machine(RATES, ranks=2)}
    whole = inspect_model(str(tmp_path), "w4a16g16-sym", "gptq", **given)
    alone = inspect_model(str(tmp_path), "w4a16g16-sym", "gptq", config_only=True, **given)
    assert {key: whole[key] for key in alone} == alone


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "0"], "--ranks 0 given; it must be 1 or more"),
        (["--flops", "1T"], "--flops given without --bandwidth"),
        (["--bandwidth", "1T"], "--bandwidth given without --flops"),
        (["--flops", "fast", "--bandwidth", "1T"], "--flops fast given; give a number a second"),
        (["--device-memory", "much"], "--device-memory much given; give a number with"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 given, which is for a device"),
        (["--config-only", "--recipe", "gtpq"], "gptq"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(options, said, tmp_path, command):
    tiny_model("llama").config.save_pretrained(tmp_path)
    code, out, err = command("inspect", tmp_path, *options)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("model", ["demo", "nowhere/at/all"])
def test_config_only_names_what_it_takes(model, command):
    code, _, err = command("inspect", model, "--config-only")
    assert code == 2
    assert "config.json" in err


def test_a_rate_is_a_number_above_nothing():
    assert rate_in("1.5p", "--flops") == 1.5e15
    for text in ("0", "-1T", "1X", ""):
        with pytest.raises(LowbitError, match="give a number a second"):
            rate_in(text, "--flops")
